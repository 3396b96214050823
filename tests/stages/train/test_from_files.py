"""`croco train FILE...`: pairs of any tool, through the program itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

import tiny
from conftest import TinyModels
from croco.cli.main import app
from croco.errors import UserError
from croco.models.loading import load_policy
from croco.pipeline.stage import lock
from croco.stages.pair.import_files import import_pairs
from croco.storage import records, shards
from stages.train.pairs import make_pairs

SETTINGS = [
    "--set=training.learning_rate=1e-2",
    "--set=training.batch_pairs=6",
    "--set=training.lora.rank=4",
    "--set=training.validation_fraction=0.2",
    "--set=runtime.device=cpu",
]


def turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def rows(form: str, num_rows: int = 18) -> list[dict]:
    """The same pairs as each tool would write them."""
    made = []
    for row in make_pairs(num_rows).iter_rows(named=True):
        prompt, chosen, rejected = row["messages"], row["chosen"], row["rejected"]
        sides = {"chosen": turn("assistant", chosen), "rejected": turn("assistant", rejected)}
        made.append(
            {
                "ours": row,
                "trl-text": {"prompt": prompt[0]["content"], "chosen": chosen, "rejected": rejected},
                "trl-messages": {"prompt": prompt, **sides},
                "trl-implicit": {side: prompt + said for side, said in sides.items()},
                "ultrafeedback-binarized": {
                    "prompt": prompt[0]["content"],
                    "prompt_id": row["prompt_id"],
                    "score_chosen": 8.0,
                    "score_rejected": 5.0,
                    **{side: prompt + said for side, said in sides.items()},
                },
                "ultrafeedback": {
                    "prompt_id": row["prompt_id"] + row["language"],
                    "instruction": prompt[0]["content"],
                    "completions": [
                        {"response": text, "overall_score": score}
                        for text, score in ((rejected, 5.0), (chosen, 8.5), ("juin " + rejected, 7.0))
                    ],
                },
            }[form]
        )
    return made


FORMS = ["ours", "trl-text", "trl-messages", "trl-implicit", "ultrafeedback-binarized", "ultrafeedback"]


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return path


def croco(*words: object, code: int = 0) -> str:
    """What the program says, on both streams."""
    found = CliRunner().invoke(app, [str(word) for word in words])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == code, found.output
    return found.output


def test_a_second_training_into_the_same_folder_waits_for_nothing(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    pairs, to = write(tmp_path / "pairs.jsonl", rows("ours")), tmp_path / "out"
    with lock(to):
        said = croco("train", pairs, "--model", tiny_models.policy, "--to", to, *SETTINGS, code=2)
    assert "is in use by another croco process" in said
    croco("train", pairs, "--model", tiny_models.policy, "--to", to, *SETTINGS)
    (to / "scratch" / "left by a kill").mkdir(parents=True)
    again = croco("train", pairs, "--model", tiny_models.policy, "--to", to, *SETTINGS)
    assert [line.split(maxsplit=1) for line in again.splitlines()[:2]] == [
        ["import", "complete, skipped"],
        ["train", "complete, skipped"],
    ]
    assert not (to / "scratch").exists()


@pytest.mark.parametrize("form", FORMS[:-1])
def test_every_form_says_the_same_pairs(form: str, tmp_path: Path) -> None:
    found, _ = import_pairs([write(tmp_path / "pairs.jsonl", rows(form))])
    wanted = make_pairs(18)
    assert found.select("messages", "chosen", "rejected").equals(
        wanted.select("messages", "chosen", "rejected")
    )
    assert found["language"].to_list() == (wanted["language"].to_list() if form == "ours" else ["und"] * 18)
    if form in ("ours", "ultrafeedback-binarized"):
        assert found["prompt_id"].to_list() == wanted["prompt_id"].to_list()


def demonstrations(form: str) -> list[dict[str, Any]]:
    """Rows for supervised tuning in TRL's forms."""
    found = []
    for pair in make_pairs(18).to_dicts():
        answer = {"role": "assistant", "content": pair["chosen"]}
        prompt, completion = pair["messages"], [answer]
        if form == "text":
            prompt, completion = pair["messages"][-1]["content"], pair["chosen"]
        whole = {"messages": [*pair["messages"], answer]}
        found.append(whole if form == "conversation" else {"prompt": prompt, "completion": completion})
    return found


@pytest.mark.parametrize("form", ["text", "messages", "conversation"])
def test_supervised_tuning_takes_a_completion_a_row(
    form: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    source = write(tmp_path / "sft.jsonl", demonstrations(form))
    found, _ = import_pairs([source], chosen_only=True)
    assert found["chosen"].to_list() == make_pairs(18)["chosen"].to_list()
    assert all(messages[-1]["role"] == "user" for messages in found["messages"].to_list())
    command = ["train", source, "--model", tiny_models.policy, "--to", tmp_path / "tuned", *SETTINGS]
    assert "18 pairs, 3 steps" in croco(*command, "--set", "training.method=sft")
    with pytest.raises(UserError, match=r"line 1: no columns chosen and rejected with values"):
        import_pairs([source])


def test_a_demonstration_needs_a_prompt(tmp_path: Path) -> None:
    source = write(tmp_path / "sft.jsonl", [{"messages": [{"role": "assistant", "content": "Ja."}]}])
    with pytest.raises(UserError, match=r"line 1: found no prompt"):
        import_pairs([source], chosen_only=True)


# scored completions are paired first, and two prompts lose theirs to the language guard: the texts are random words
@pytest.mark.parametrize(("form", "num_pairs", "steps"), [("trl-messages", 18, 3), ("ultrafeedback", 16, 2)])
def test_any_preference_file_tunes_a_policy(
    form: str, num_pairs: int, steps: int, tiny_models: TinyModels, tmp_path: Path
) -> None:
    source = write(tmp_path / "pairs.jsonl", rows(form))
    language = ["--language", "da"] if form == "ultrafeedback" else []
    to = tmp_path / "tuned"
    command = [
        "train",
        source,
        "--model",
        tiny_models.policy,
        "--to",
        to,
        "--license=mit",
        *language,
        *SETTINGS,
    ]
    said = croco(*command)
    assert f"{num_pairs} pairs, {steps} steps: {to / 'adapter'}" in said
    load_policy(str(tiny_models.policy), adapter=to / "adapter")
    record = records.read_record(to)
    assert record["state"] == "complete"
    assert record["science"]["settings"]["training"]["lora"]["rank"] == 4
    assert record["facts"]["pairs"] + record["facts"]["validation_pairs"] == num_pairs
    card = (to / "README.md").read_text()
    assert 'license: "mit"' in card
    assert "library_name: peft" in card
    assert "pairs: pairs.jsonl | sha256:" in card
    assert not (to / "scratch").exists()
    before = load_file(to / "adapter" / "adapter_model.safetensors")
    assert "complete, skipped" in croco(*command).splitlines()[-2]
    after = load_file(to / "adapter" / "adapter_model.safetensors")
    assert all(before[name].equal(after[name]) for name in before)
    said = croco(*command, "--set=training.beta=0.3", code=2)
    assert "training.beta: 0.1 → 0.3" in said
    said = croco(*command, "--set=training.beta=0.3", "--rebuild")
    assert "removed, to be made again" in said
    assert records.read_record(to)["science"]["settings"]["training"]["beta"] == 0.3


def test_our_own_table_is_read_with_its_ids(tmp_path: Path) -> None:
    pairs = make_pairs(6).with_columns(
        chosen_ids=pl.Series([[5, 6]] * 6, dtype=pl.List(pl.Int32)), chosen_language=pl.lit("da")
    )
    pairs.write_parquet(tmp_path / "part-00000.parquet")
    found, _ = import_pairs([tmp_path / "part-00000.parquet"])
    assert found["chosen_ids"].to_list() == [[5, 6]] * 6
    assert found["chosen_language"].to_list() == ["da"] * 6


GOOD = {"prompt": "Which month?", "chosen": "April", "rejected": "maj"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "x", "chosen": "y"}, r"row 2|line 2.*no columns chosen and rejected .*found: prompt, chosen"),
        ({**GOOD, "prompt": None}, "found no prompt"),
        ({**GOOD, "chosen": 7}, "chosen is a number, expected text or messages"),
        ({"chosen": turn("user", "a") + turn("user", "b"), "rejected": turn("user", "a") + turn("user", "c")},
         "chosen ends with the user's turn"),
        ({"chosen": turn("user", "a") + turn("assistant", "b"), "rejected": turn("user", "x") + turn("assistant", "b")},
         "differ before their last turn"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_pair_is_named(row: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        import_pairs([write(tmp_path / "pairs.jsonl", [GOOD, row])])


@pytest.mark.parametrize("ids", [["a"], 5, [-5, 5], [1.5], [True]])
def test_token_ids_that_are_none_are_named(ids: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pairs\.jsonl, line 1: chosen_ids is .*expected token ids"):
        import_pairs([write(tmp_path / "pairs.jsonl", [{**GOOD, "chosen_ids": ids}])])


def test_rows_that_cannot_be_used_go_to_the_ledger(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "tools": [{"name": "f"}]}, {**GOOD, "chosen_finish_reason": "content_filter"}]
    pairs, drops = import_pairs([write(tmp_path / "pairs.jsonl", rows)])
    assert pairs.height == 1
    assert [drop[4] for drop in drops] == [
        "the row has tools, which a prompt cannot carry",
        "the completion ended with 'content_filter'",
    ]
    kto = [{"prompt": "x", "completion": "y", "label": label} for label in (True, False)]
    pairs, drops = import_pairs([write(tmp_path / "kto.jsonl", kto)], chosen_only=True)
    assert (pairs.height, [drop[4] for drop in drops]) == (
        1,
        ["label is false: the completion is not to be learnt"],
    )
    with pytest.raises(UserError, match=r"no rows that can be used \(1 left out, label is false"):
        import_pairs([write(tmp_path / "none.jsonl", kto[1:])], chosen_only=True)


def test_the_last_line_says_how_many_pairs_were_left_out_and_where(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    given = rows("trl-text")
    for row in given[:3]:
        row["chosen"] += " juin" * 2000  # longer than the policy's context
    pairs, to = write(tmp_path / "pairs.jsonl", given), tmp_path / "out"
    said = croco("train", pairs, "--model", tiny_models.policy, "--to", to, *SETTINGS)
    last = said.splitlines()[-1]
    assert f"{len(given) - 3} pairs, 3 left out ({to / 'dropped.parquet'}), " in last
    assert shards.read_parquet(to / "dropped.parquet").height == 3


def test_words_that_do_not_go_together_are_named(tiny_models: TinyModels, tmp_path: Path) -> None:
    source = write(tmp_path / "pairs.jsonl", [GOOD])
    model, to = ["--model", tiny_models.policy], ["--to", tmp_path / "out"]
    for words, wanted in (
        ([source], "pairs need --model MODEL and --to FOLDER"),
        ([source, *model, *to, "--arm", "x"], "--arm is for a recipe"),
        ([tmp_path / "r.toml", *to], "--to: for files of pairs"),
        (
            [source, *model, *to, "--set=sampling.completions=3"],
            "expected a key of training, policy, runtime",
        ),
        ([source, *model, *to, "--set=training.bta=3"], "bta"),
        ([tmp_path / "no.jsonl", *model, *to], "no such file"),
        ([source, "--model", tmp_path / "none", *to], "no such directory"),
        ([source, *model, "--to", tmp_path], "and no stage.json: croco has not made it"),
    ):
        assert wanted in croco("train", *words, code=2)
    assert not (tmp_path / "out").exists()


def test_a_trial_on_the_first_pairs_then_merged_and_talked_to(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    """The folder that `croco train FILE` leaves is enough for `croco merge` and `croco chat`."""
    pairs, tuned, whole = (
        write(tmp_path / "pairs.jsonl", rows("ours")),
        tmp_path / "tuned",
        tmp_path / "whole",
    )
    given = ["train", pairs, "--model", tiny_models.policy, "--to", tuned, *SETTINGS]
    template = "{% if brief %}Be brief.{% endif %}" + tiny.CHAT_TEMPLATE
    (tmp_path / "brief.jinja").write_text(template)
    given += [
        f"--set=policy.chat_template={tmp_path}/brief.jinja",
        "--set=policy.chat_template_kwargs={brief=true}",
    ]
    said = croco(*given, "--limit", 7)
    assert "7 pairs" in said.splitlines()[-1]
    assert "limit" in croco(*given, code=2)  # what changed
    inside = shutil.copy(pairs, tuned / "mine.jsonl")
    said = croco("train", inside, *given[2:], "--rebuild", code=2)
    assert f"mine.jsonl lies in {tuned}, where the policy is tuned: expected another folder" in said
    nowhere = ["train", pairs, "--to", tmp_path / "nowhere", "--model", "nobody/nothing"]
    assert "policy.model = 'nobody/nothing' does not load" in croco(*nowhere, code=2)
    assert not (tmp_path / "nowhere").exists()
    said = croco("merge", tuned, "--to", whole, "--license", "mit")
    assert "are those of base + adapter within" in said
    both = [load_policy(str(tiny_models.policy), adapter=tuned / "adapter")[0], load_policy(str(whole))[0]]
    ids = torch.tensor([[5, 6, 7, 8]])
    one, other = (model(ids).logits for model in both)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    # what was trained on goes along: the template, and what it is told
    turn = [{"role": "user", "content": "Hi"}]
    assert (
        AutoTokenizer.from_pretrained(whole).apply_chat_template(turn, tokenize=False).startswith("Be brief.")
    )
    card = (whole / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "license: mit" in card
    assert "# Tuned on pairs.jsonl" in card
    assert "merged against base + adapter, at most" in card
    assert str(tmp_path) not in card
    for folder in (tuned, whole):
        found = CliRunner().invoke(app, ["chat", str(folder), "--max-new-tokens=4"], input="Which month?\n")
        assert (found.exit_code, found.stdout.count("\n") >= 1) == (0, True), found.output
