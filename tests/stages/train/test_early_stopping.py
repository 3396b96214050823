"""When tuning stops, on numbers worked by hand, and on real runs that go wrong."""

import json
import math
from pathlib import Path

import polars as pl
import pytest
from safetensors.torch import load_file

from croco.report.curves import sentinel as noted
from croco.stages.train.checkpoints import SEAL, best_checkpoint, sealed
from croco.stages.train.early_stopping import Sentinel, Stopped, alarm, best_step, shortcuts_of
from croco.stages.train.train import train_pairs
from stages.train.pairs import make_pairs, replace
from stages.train.test_train import SETTINGS, TOKENIZER, metrics, run
from tiny import make_policy

SENTINEL = Sentinel()


def step(number: int, **values: float) -> dict:
    usual = {"loss": 0.6, "grad_norm": 1.0, "logratios/chosen": 0.0, "kl": 0.0, "rewards/accuracies": 0.5}
    return {"step": number, "split": "train", "pairs": 8, **usual, **values}


def evaluation(number: int, **values: float) -> dict:
    return {"step": number, "split": "validation", "loss": 0.6, "logratios/chosen": 0.0, "kl": 0.0, **values}


def reason(lines: list[dict], settings: Sentinel = SENTINEL, **aucs: float) -> str | None:
    return alarm(settings, lines, aucs, 1e-3)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"logratios/chosen": -1.5}, "fell by 1.5 nats per token under the reference's"),
        ({"kl": 3.5}, "KL divergence to the reference on the training pairs is 3.5"),
    ],
)
def test_three_steps_past_a_bound_stop_and_two_do_not(values, said):
    past = [step(i, **values) for i in (2, 3, 4)]
    assert reason([step(1), *past[:2]]) is None
    assert said in reason([step(1), *past])
    assert reason([*past[:2], step(4)]) is None
    assert reason([step(1), *past], replace(SENTINEL, enabled=False)) is None


def test_one_evaluation_past_a_bound_stops():
    assert reason([evaluation(0), evaluation(4, **{"logratios/chosen": -0.4})]) is None
    found = reason([evaluation(0), evaluation(4, **{"logratios/chosen": -1.25})])
    assert "held-out completions fell by 1.25" in found


def test_without_a_reference_tuning_is_held_against_its_beginning():
    lines = [
        {"step": i, "split": "validation", "loss": 1.0, "nll": loss}
        for i, loss in ((0, 2.0), (4, 2.25), (8, 3.25))
    ]
    assert reason(lines[:2]) is None
    assert "fell by 1.25 nats per token since the beginning" in reason(lines)


def test_a_gradient_norm_far_above_the_first_steps_stops():
    first = [step(i, grad_norm=0.5) for i in range(1, 11)]
    wild = [step(i, grad_norm=60.0) for i in (11, 12, 13)]
    assert reason([*first, *wild[:2], step(13)]) is None
    assert "the gradient norm is 60, more than" in reason([*first, *wild])


def test_numbers_that_are_none_stop_at_once_even_with_the_sentinel_off():
    found = reason([step(1, grad_norm=math.inf)], replace(SENTINEL, enabled=False))
    assert found == "the gradient norm is inf (learning rate 0.001), expected a finite number"


def test_being_right_at_once_stops_where_a_shortcut_explains_it():
    right = [step(i, **{"rewards/accuracies": 1.0}) for i in (5, 6, 7)]
    assert reason(right, language=0.8) is None
    assert reason([step(4), *right[:2]], language=1.0) is None
    assert reason([{**line, "pairs": 7} for line in right], language=1.0) is None  # 21 pairs may be chance
    assert reason([{**line, "step": line["step"] + 20} for line in right], language=1.0) is None
    found = reason(right, language=0.99, length=0.7)
    assert found.startswith("every pair is told right after 7 steps, and language alone tells")


def test_shortcuts_of_pairs_from_anywhere():
    pairs = make_pairs(60)
    assert set(shortcuts_of(pairs)) == {"finish reason", "language", "length"}
    assert shortcuts_of(pairs)["language"] == 0.5
    told = pairs.with_columns(chosen_language=pl.lit("en"), rejected_language=pl.lit("da"))
    assert shortcuts_of(told)["language"] == 1.0
    longer = pairs.with_columns(chosen=pl.col("rejected") + " more")
    assert shortcuts_of(longer)["length"] == 1.0
    assert shortcuts_of(pairs.drop("rejected")) == {}


def test_the_best_step_has_the_lowest_held_out_loss_and_is_no_beginning():
    lines = [
        evaluation(0, loss=0.1),
        evaluation(4, loss=0.5),
        step(5),
        evaluation(8, loss=0.4),
        evaluation(12, loss=0.4),
    ]
    assert best_step(lines) == 8
    assert best_step(lines[:1]) is None
    assert best_step([step(1)]) is None


def test_a_run_that_collapses_stops_and_keeps_the_best_checkpoint(tmp_path):
    """Pairs that pull apart without end, at a rate that ruins the policy; the bound is one that a good start keeps."""
    settings = replace(
        SETTINGS,
        epochs=12,
        learning_rate=5e-2,
        scheduler="constant",
        lora=replace(SETTINGS.lora, dropout=0.0),  # what happens depends on no draw
        sentinel=Sentinel(evaluations=16, max_chosen_drop=0.2),
    )
    result = run(tmp_path, settings)
    assert result.stopped.startswith("training stopped at step ")
    assert "max_chosen_drop = 0.2" in result.stopped
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["split"] == "stopped"
    assert result.stopped.endswith(last["reason"])
    assert last["step"] < result.steps
    # the report reads these lines
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert noted({"arm": lines}) == [(0, "arm", last["step"], last["reason"])]
    held_out = {
        line["step"]: line for line in metrics(tmp_path, "validation") if 0 < line["step"] < last["step"]
    }
    assert result.adapter_step == min(held_out, key=lambda s: held_out[s]["loss"])
    assert held_out[result.adapter_step]["logratios/chosen"] > -0.2
    checkpoint = tmp_path / "scratch" / "checkpoints" / f"checkpoint-{result.adapter_step}"
    wanted, found = (load_file(path / "adapter_model.safetensors") for path in (checkpoint, result.adapter))
    assert all(found[name].equal(wanted[name]) for name in wanted)


def test_without_a_good_checkpoint_a_stop_is_an_error(tmp_path):
    settings = replace(SETTINGS, learning_rate=10.0, epochs=20, scheduler="constant")
    with pytest.raises(Stopped, match="no good checkpoint yet to go on with"):
        run(tmp_path, settings)
    assert not (tmp_path / "adapter").exists()


def test_pairs_told_apart_by_their_language_stop(tmp_path):
    pairs = make_pairs(120).with_columns(
        chosen=pl.lit("Which month comes after March"),
        rejected=pl.lit("maj efter kommer juin quel vient"),
        chosen_language=pl.lit("en"),
        rejected_language=pl.lit("da"),
    )
    settings = replace(SETTINGS, batch_pairs=8, epochs=3, validation_fraction=0.0)
    with pytest.raises(Stopped, match=r"alone tells chosen from rejected \(AUC 1.00\)"):
        train_pairs(make_policy("llama"), TOKENIZER, pairs, settings=settings, folder=tmp_path, seed=0)


def test_the_best_checkpoint_stays_and_the_others_go(tmp_path):
    """A loss that rises again: the lowest is neither the first nor among the last two."""
    settings = replace(SETTINGS, epochs=10, learning_rate=1e-2, sentinel=Sentinel(evaluations=10))
    result = run(tmp_path, settings)
    held_out = {line["step"]: line["loss"] for line in metrics(tmp_path, "validation") if line["step"] > 0}
    best = min(held_out, key=lambda s: (held_out[s], s))
    kept = [int(path.name.split("-")[1]) for path in sealed(tmp_path / "scratch" / "checkpoints")]
    assert result.adapter_step == best
    assert set(kept) == {best, *sorted(held_out)[-2:]}
    assert best not in sorted(held_out)[-2:]


def test_a_checkpoint_without_its_seal_is_not_chosen(tmp_path):
    for number, loss in ((2, 0.5), (4, 0.3)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(evaluation(number, loss=loss)) + "\n")
    (tmp_path / "checkpoint-2" / SEAL).write_text("{}")  # of no other file
    assert best_checkpoint(tmp_path, tmp_path / "metrics.jsonl") == Path(tmp_path / "checkpoint-2")
