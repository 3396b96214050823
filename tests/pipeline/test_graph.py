"""Every arm on a tiny world: it runs, its tables are what its words say, and a second run computes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from conftest import TinyModels
from croco.config.load import from_dict, merged
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.pipeline import run as pipeline
from croco.storage import files, shards

# 6 prompts in three languages, 6 short completions each, two steps of training, greedy answers to two prompts
WORLD: dict[str, Any] = {
    "run": {"name": "arms", "seed": 3, "languages": ["en", "da", "de"]},
    "prompts": {"source": "lab", "limit": 6},
    "sampling": {"completions": 6, "max_new_tokens": 24},
    "guards": {"cut": "off", "wrong_language": "off"},
    "training": {
        "learning_rate": 3e-3,
        "warmup_ratio": 0.0,
        "batch_pairs": 8,
        "max_tokens": 128,
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.0},
    },
    "evaluation": {"source": "lab", "limit": 2, "temperatures": [0.0], "max_new_tokens": 8, "bootstrap": 20},
    "runtime": {"device": "cpu", "threads": 1, "shard_prompts": 6},
}


def world(folder: Path, arms: dict[str, Any], **more: Any) -> Recipe:
    """A recipe of the tiny world with these arms."""
    return from_dict(merged(WORLD, {"run": {"folder": str(folder)}, "arms": arms} | more))


def run(recipe: Recipe, until: str = "results", rebuild: bool = False) -> list[str]:
    said: list[str] = []
    pipeline.run(recipe, until=until, rebuild=rebuild, say=said.append)
    return said


def table(recipe: Recipe, title: str) -> pl.DataFrame:
    return shards.read_table(recipe.folder / title)


ALL: dict[str, Any] = {
    "monolingual": {"languages": ["en", "da"]},
    "multilingual": {"pool": "all", "calibration": "zscore", "completions": 4},
    "english": {"languages": ["en"], "evaluated": False},
    "gold": {"training": {"method": "sft"}, "chosen": "reference"},
    "max-r": {"pool": "all", "training": {"method": "sft"}},
    "gold-chosen": {"chosen": "reference", "rejected": "mean"},
    "random": {"scorer": "random", "languages": ["da"]},
    "likelihood": {"scorer": "likelihood", "languages": ["da"]},
    "likelihood-sum": {"scorer": "likelihood-sum", "languages": ["da"], "completions": 4},
    "verified": {"scorer": "verified", "pool": "all", "rejected": "min"},
    "iterative": {"start": "monolingual", "reference": "start", "languages": ["en", "da"], "completions": 4},
    "online": {"rounds": 2, "completions": 2, "rejected": "min", "languages": ["en", "da"]},
    "off-policy": {"sampler": {"model": "lab:other"}, "languages": ["da"], "completions": 4},
    "off-policy-min": {
        "sampler": {"model": "lab:other"},
        "languages": ["da"],
        "rejected": "min",
        "completions": 3,
    },
    "icr": {
        "scorer": "implicit",
        "implicit": {"arm": "english"},
        "languages": ["da", "de"],
        "training": {"nll_weight": 1.0},
    },
    "mapo": {"scorer": "alignment", "languages": ["da", "de"], "rejected": "min", "pairs_per_pool": 2},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """One run of every arm; before it, of three of them up to the page (drawing all takes longer than all the rest)."""
    folder = tmp_path_factory.mktemp("arms") / "run"
    few = {name: ALL[name] for name in ("english", "icr", "off-policy")}
    run(world(folder, few), until="report")
    recipe = world(folder, ALL, alignment={"model": "lab:translator", "targets": 2})
    said = run(recipe, rebuild=True)
    assert "train/icr" in {line.split()[0] for line in said if line.endswith("complete, skipped")}
    return recipe


def test_every_arm_is_trained_and_those_that_count_are_evaluated(study: Recipe) -> None:
    for arm in study.arms:
        assert (study.folder / "train" / arm / "adapter" / "adapter_model.safetensors").is_file()
    found = set(table(study, "results")["arm"])
    assert found == {"base", *study.arms} - {"english", "online-1"}
    page = (study.folder / "report" / "report.html").read_text()
    assert "off-policy" in page
    assert "implicit reward" in page


def test_a_second_run_computes_nothing(study: Recipe) -> None:
    said = run(study)
    assert len(said) > 60
    assert all(line.endswith("complete, skipped") for line in said)


def test_own_completions_go_on_where_they_were_cut_off(study: Recipe) -> None:
    """As if killed between the shards: the rest is made again, the same to the last bit, and nothing else."""
    folder = study.folder / "sample" / "iterative"
    before, kept = table(study, "sample/iterative"), files.read_json(folder / "stage.json")
    shards.marker_path(folder, 1).unlink()
    files.write_json(folder / "stage.json", kept | {"state": "running"})
    said = [line for line in run(study) if not line.endswith("complete, skipped")]
    assert said[0] == f"{'sample/iterative':<24} unfinished, going on"
    assert len(said) == 2
    assert table(study, "sample/iterative").equals(before)


def test_an_arm_with_a_reward_of_its_own_has_scores_of_its_own(tmp_path: Path) -> None:
    arms = {
        "own": {"reward": {"weight": -1.0}},
        "shared": {},
        "same": {"reward": {"weight": -1.0}},
    }
    made = {node.title: node for node in pipeline.nodes(world(tmp_path, arms))}
    assert {title for title in made if title.startswith("score")} == {"score", "score/own"}
    assert made["score"].fingerprint != made["score/own"].fingerprint
    assert made["pair/same"].inputs["score"] is made["score/own"]
    with pytest.raises(UserError, match="reward is there, and scorer"):
        world(tmp_path, {"own": {"reward": {"weight": -1.0}, "scorer": "random"}})


def test_nothing_is_computed_twice(study: Recipe) -> None:
    """One table of the base's completions, one of the other model's for two arms, one per later policy."""
    titles = {node.title for node in pipeline.nodes(study)}
    assert {title for title in titles if title.startswith("sample")} == {
        "sample",
        "sample/iterative",
        "sample/online",
        "sample/off-policy",
    }
    scores = {"score", "score/iterative", "score/online", "score/off-policy"}
    own = ("random", "likelihood", "likelihood-sum", "verified", "icr", "mapo")
    assert {title for title in titles if title.startswith("score/") or title == "score"} == scores | {
        f"score/{arm}" for arm in own
    }


def test_pairs_are_of_the_arms_languages_completions_and_prompts(study: Recipe) -> None:
    for name, arm in study.arms.items():
        pairs = table(study, f"pair/{name}")
        assert pairs.height, name
        assert set(pairs["language"]) <= set(study.languages_of(arm))
        if arm.completions:
            assert pairs["chosen_sample_id"].max() < arm.completions
            assert pairs["rejected_sample_id"].drop_nulls().max() < arm.completions
    first, second = (set(table(study, f"pair/{name}")["prompt_id"]) for name in ("online-1", "online"))
    assert not first & second
    every = sorted(set(table(study, "prompts")["prompt_id"]))
    assert first <= set(every[::2])
    assert second <= set(every[1::2])
    assert set(table(study, "sample/online")["prompt_id"]) == set(every[1::2])


def test_own_completions_are_only_those_that_are_asked_for(study: Recipe) -> None:
    iterative, online = table(study, "sample/iterative"), table(study, "sample/online")
    assert (iterative.height, set(iterative["language"])) == (6 * 2 * 4, {"en", "da"})
    assert (online.height, set(online["language"])) == (3 * 2 * 2, {"en", "da"})
    # of two arms that share them, the larger number
    assert table(study, "sample/off-policy").height == 6 * 4


def test_scores_are_of_those_completions_that_are_asked_for(study: Recipe) -> None:
    assert table(study, "score").height == 6 * 3 * 6
    assert table(study, "score/likelihood-sum").height == 6 * 3 * 4
    assert table(study, "score/likelihood-sum")["sample_id"].max() == 3


def test_a_later_round_samples_from_the_policy_before_it_with_other_noise(study: Recipe) -> None:
    key = ["prompt_id", "language", "sample_id"]
    both = table(study, "sample").join(table(study, "sample/iterative"), on=key, suffix="_later")
    assert both.height == 6 * 2 * 4
    assert not (both["seed"] == both["seed_later"]).any()
    node = next(node for node in pipeline.nodes(study) if node.title == "sample/iterative")
    assert node.inputs["train"].title == "train/monolingual"


def test_off_policy_completions_say_whose_they_are_and_keep_ids_of_one_tokenizer(study: Recipe) -> None:
    found = table(study, "sample/off-policy")
    assert set(found["policy"]) == {"lab:other"}
    assert found["completion_ids"].null_count() == 0
    facts = files.read_json(study.folder / "sample" / "off-policy" / "stage.json")["facts"]
    assert facts["ids_kept"] is True


def test_ids_of_another_tokenizer_are_not_kept_and_text_is_trained_on(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    recipe = world(
        tmp_path / "run", {"off": {"sampler": {"model": str(tiny_models.policy)}, "scorer": "random"}}
    )
    run(recipe, until="train")
    found = table(recipe, "sample/off")
    assert found["completion_ids"].null_count() == found.height == 6 * 3 * 6
    assert files.read_json(recipe.folder / "sample" / "off" / "stage.json")["facts"]["ids_kept"] is False
    assert table(recipe, "pair/off")["chosen_ids"].null_count() == table(recipe, "pair/off").height > 0
    assert not (recipe.folder / "sample" / "stage.json").exists()  # nobody asked for the base's


def test_a_round_goes_on_from_the_adapter_before_it(study: Recipe) -> None:
    """Held against its own start the first margin is zero; held against the base it is not."""

    def first_margin(arm: str) -> float:
        lines = (study.folder / "train" / arm / "metrics.jsonl").read_text().splitlines()
        return float(next(json.loads(line)["rewards/margins"] for line in lines))

    assert first_margin("monolingual") == pytest.approx(0, abs=1e-6)
    assert first_margin("iterative") == pytest.approx(0, abs=1e-6)
    assert abs(first_margin("online")) > 1e-5  # one short step away; rounding is 1e-7


def test_length_control_evens_out_chosen_and_rejected(study: Recipe) -> None:
    pairs = table(study, "pair/icr")
    assert set(pairs["calibration"]) == {"length"}
    tokens = table(study, "sample").select("prompt_id", "language", "sample_id", "completion_tokens")
    mean = {}
    for side in ("chosen", "rejected"):
        key = ["prompt_id", f"{side}_language", f"{side}_sample_id"]
        found = pairs.join(tokens, left_on=key, right_on=["prompt_id", "language", "sample_id"], how="left")
        mean[side] = found["completion_tokens"].mean()
    assert mean["chosen"] == pytest.approx(mean["rejected"], abs=3)


def test_an_alignment_has_no_english_side(study: Recipe) -> None:
    assert set(table(study, "score/mapo")["language"]) == {"da", "de"}
    ledger = shards.read_dropped(study.folder / "score" / "mapo")
    assert set(ledger["language"]) == {"en"}
    assert ledger.height == 6 * 6


def test_verified_scores_are_the_labs_own_tiers(study: Recipe) -> None:
    from croco.lab.world import verify

    scored = table(study, "score/verified").join(
        table(study, "sample"), on=["prompt_id", "language", "sample_id"]
    )
    assert set(scored["score"]) <= {0.0, 0.5, 3.0}
    for row in scored.iter_rows(named=True):
        good = verify(row["prompt_id"], row["language"], row["completion"]).good
        assert (row["score"] == 3.0) == good


# Recipes that do not fit ----------------------------------------------------------------------------------------------

EN = {"languages": ["en"]}


@pytest.mark.parametrize(
    ("arms", "sentence"),
    [
        ({"a": {"start": "b"}}, "arms.a.start = 'b', expected an arm of this recipe: one of a"),
        ({"a": {"start": "b"}, "b": {"start": "a"}}, "arms.a starts from itself, by way of a and b"),
        ({"a": {"start": "a"}}, "arms.a starts from itself, by way of a"),
        ({"a": {"reference": "start"}}, "start is missing"),
        ({"a": {"languages": ["fr"]}}, "arms.a.languages: 'fr' is not tuned, expected of en, da, de"),
        ({"a": {"completions": 7}}, "arms.a.completions = 7, but only sampling.completions = 6 are sampled"),
        ({"a": {"completions": 1}}, "arms.a.completions = 1, expected at least 2"),
        ({"a": {"scorer": "implicit"}}, "implicit is missing"),
        ({"a": {"implicit": {"arm": "b"}}, "b": EN}, "implicit is there, and scorer"),
        (
            {"a": {"scorer": "implicit", "implicit": {"arm": "b"}}},
            "arms.a.implicit.arm = 'b', expected an arm",
        ),
        (
            {"a": {"scorer": "implicit", "implicit": {"arm": "b"}}, "b": {}},
            'expected an arm that is tuned by DPO from the base on languages = ["en"]',
        ),
        (
            {"a": {"scorer": "implicit", "implicit": {"arm": "b", "instruction": "In Danish."}}, "b": EN},
            "arms.a.implicit.instruction does not name its {language}",
        ),
        ({"a": {"scorer": "alignment"}}, "arms.a.scorer = 'alignment' needs [alignment]"),
        ({"a": {"calibration": "length"}}, 'expected chosen = "max" and rejected = "min"'),
        ({"a": {"sampler": {"model": "lab:other"}, "rounds": 2}}, "expected no sampler here"),
        ({"a": {"rounds": 0}}, "arms.a.rounds = 0, expected more than 0"),
        ({"a": {"rounds": 2}, "a-1": {}}, "arms.a-1 is a round of arms.a: expected another name"),
        ({"a": {"part": [3, 2]}}, "part = [3, 2], expected such as [1, 4] to [4, 4]"),
        (
            {"a": {"start": "b"}, "b": {"training": {"lora": {"rank": 3}}}},
            "arms.a goes on training the adapter of 'b': expected the same training.lora.rank",
        ),
        ({"a": {"startt": "b"}}, "unknown key 'arms.a.startt'; did you mean 'arms.a.start'?"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, arms: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        world(tmp_path, arms)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_verified_score_needs_the_lab(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is the lab's program"):
        world(tmp_path, {"a": {"scorer": "verified"}}, prompts={"source": "mine.jsonl"})


# Ways of writing ------------------------------------------------------------------------------------------------------


def test_rounds_are_arms_one_after_the_other(tmp_path: Path) -> None:
    recipe = world(tmp_path, {"online": {"rounds": 3, "reference": "start"}})
    chain = {name: (arm.start, arm.reference, arm.part, arm.evaluated) for name, arm in recipe.arms.items()}
    assert chain == {
        "online-1": (None, "base", (1, 3), False),
        "online-2": ("online-1", "start", (2, 3), False),
        "online": ("online-2", "start", (3, 3), True),
    }
    assert from_dict(recipe.model_dump(mode="json")) == recipe


def test_a_sweep_is_a_grid_of_arms_and_the_arm_itself_is_a_point(tmp_path: Path) -> None:
    sweep = {
        "rule": {"of": "mono", "rejected": ["min", "mean-2std", "mean+0.5std"], "completions": [4, 6]},
        "mix": {"of": "mono", "languages": [["en"], ["en", "da"], ["en", "da", "de"]]},
        "beta": {"of": "mono", "training.beta": [0.1, 0.05]},
    }
    recipe = world(tmp_path, {"mono": {}}, sweep=sweep)
    assert list(recipe.arms) == [
        "mono",
        "mono-min-4-completions",
        "mono-min-6-completions",
        "mono-mean-2std-4-completions",
        "mono-mean-plus-0-5std-4-completions",
        "mono-mean-plus-0-5std-6-completions",
        "mono-en",
        "mono-en-da",
        "mono-beta-0-05",
    ]
    assert recipe.sweep["rule"].arms["mono"] == {"rejected": "mean-2std", "completions": 6}
    assert recipe.sweep["mix"].arms["mono"] == {"languages": ["en", "da", "de"]}
    assert recipe.arms["mono-beta-0-05"].training.beta == 0.05
    assert from_dict(recipe.model_dump(mode="json")) == recipe
    # all of them choose from the same completions and scores
    assert {node.title for node in pipeline.nodes(recipe) if node.stage.name in ("sample", "score")} == {
        "sample",
        "score",
    }
    short = world(tmp_path, {"mono": {}}, sweep={"of": "mono", "rejected": ["min"]})
    assert list(short.sweep["mono"].arms) == ["mono-min"]


@pytest.mark.parametrize(
    ("sweep", "sentence"),
    [
        ({"of": "x", "rejected": ["min"]}, "sweep.x.of = 'x', expected an arm: one of mono"),
        ({"of": "mono", "rejectd": ["min"]}, "sweep.mono.rejectd = ['min'], expected a key of an arm"),
        (
            {"of": "mono", "rejected": "min"},
            "sweep.mono.rejected = 'min', expected a key of an arm with a list",
        ),
        ({"of": "mono", "rejected": ["min", "min"]}, "makes arms.mono-min twice"),
        ({"of": "mono", "rejected": ["worst"]}, 'the rule "worst" for rejected is unknown'),
        ({"a": {"of": "mono"}}, "sweep.a.grid"),
    ],
)
def test_a_mistake_in_a_sweep_is_one_sentence(tmp_path: Path, sweep: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        world(tmp_path, {"mono": {}}, sweep=sweep)
    assert sentence in str(error.value)
