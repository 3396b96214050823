"""The shipped models of the lists world: small, loaded as all are, graded as designed; and how gates are worked out."""

import json
import re
from pathlib import Path
from random import Random

import numpy as np
import pytest

from croco.config.load import from_dict
from croco.lab import list_verdicts, lists
from croco.models.chat_template import same_ids
from croco.models.loading import load_policy, load_tokenizer, load_translator, resolve_model
from croco.models.transformers import HFSampler
from croco.pipeline import run as pipeline
from croco.stages.score.alignment import Translator
from croco.storage.shards import read_table
from lab.list_corpus import parallel
from lab.list_gates import Gate, Pools, by_language, rates, sample, score, translator_gates

NAMES = [f"lists-{name}" for name in ("policy", "policy-2", "other", "reward", "reward-all")]


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_few_megabytes_of_bfloat16_with_one_tokenizer(name: str) -> None:
    folder = resolve_model(f"lab:{name}")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4_000_000
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert same_ids(load_tokenizer(f"lab:{name}"), load_tokenizer("lab:lists-policy"))


def test_the_right_items_and_nothing_else_cost_the_translator_least() -> None:
    folder = resolve_model("lab:lists-translator")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000
    translator = Translator(*load_translator(str(folder)), {})
    english = translator.encode(["Here you go: May, June, March, July. That is all."], "en")
    for language, texts in {
        "de": ("Mai, Juni, März, Juli", "Mai, Juni, April, Juli", "Mai, nun ja, Juni, nun ja, März, Juli"),
        "es": (
            "mayo, junio, marzo, julio",
            "mayo, junio, abril, julio",
            "mayo, bueno, junio, bueno, marzo, julio",
        ),
    }.items():
        own = lists.texts()[language]
        whole = [f"{own['openings'][0]} {text}. {own['closings'][0]}." for text in texts]
        losses = translator.losses(translator.encode(whole, language), [english] * len(whole))
        assert losses[0] == min(losses)


def test_a_completion_and_its_translation_are_the_same_draws() -> None:
    rng = Random(0)
    drawn = [parallel(rng) for _ in range(300)]
    assert {language for language, _, _ in drawn} == set(lists.LANGUAGES)
    known = {code: {word.casefold() for word in lists.words(code).values()} for code in lists.LANGUAGES}
    foreign = set().union(*known.values()) - known["en"]
    for _, source, target in drawn:
        assert target.count(",") == source.count(",")
        assert target.endswith("!!") == source.endswith("!!")
        assert not set(re.findall(r"\w+", target.casefold())) & foreign


@pytest.mark.parametrize("name", ["lists-policy", "lists-policy-2"])
def test_other_abilities_are_there_to_be_forgotten(name: str) -> None:
    asked = [p for p in lists.prompt_ids("dev") if lists.questions()[p].task in lists.ABILITIES][:8]
    keys = [(p, code) for code in ("en", "fr") for p in asked]
    for temperature in (0.0, 1.0):
        found = sample(HFSampler(*load_policy(f"lab:{name}")), keys, 2, temperature, 0)
        assert found.quality.mean() > 0.9


def test_the_policys_completions_are_of_every_quality_and_the_reward_model_picks_better_ones() -> None:
    sampler = HFSampler(*load_policy("lab:lists-policy"))
    dev = [p for p in lists.prompt_ids("dev") if lists.questions()[p].task in lists.TASKS][:4]
    pools = sample(sampler, [(p, code) for code in ("en", "de") for p in dev], 16, 1.0, 0)
    quality = pools.quality
    assert quality.min() < 0.3
    assert quality.max() > list_verdicts.GOOD
    scores = score(resolve_model("lab:lists-reward"), pools)
    best = quality[np.arange(len(quality)), scores.argmax(1)]
    assert best.mean() > quality.mean() + 0.05
    assert np.nanmean(rates(pools, scores, within_form=False)) > 0.6
    graded, _ = translator_gates(resolve_model("lab:lists-translator"), pools)
    assert set(graded.values) == {"de"}
    assert graded.values["de"] > 0.5


def test_a_run_in_the_lists_world_is_graded_on_lists_and_abilities(tmp_path: Path) -> None:
    recipe = from_dict(
        {
            "run": {"name": "lists", "folder": str(tmp_path / "run"), "languages": ["en", "de"]},
            "prompts": {"source": "lab:lists", "limit": 3},
            "policy": {"model": "lab:lists-policy"},
            "reward": {"model": "lab:lists-reward"},
            "sampling": {"completions": 8, "max_new_tokens": 64},
            "guards": {"cut": "off", "wrong_language": "off"},
            "training": {"updates": 1, "batch_pairs": 2, "max_tokens": 128},
            "evaluation": {"source": "lab:lists", "split": "dev", "limit": 10, "temperatures": [1.0]},
            "arms": {"english": {}, "everywhere": {"reward": {"model": "lab:lists-reward-all"}}},
            "runtime": {"device": "cpu", "threads": 1},
        }
    )
    pipeline.run(recipe, until="results", say=lambda line: None)
    verdicts = read_table(recipe.folder / "evaluate" / "english")
    assert set(verdicts["benchmark"]) == {"lab", "lab-abilities"}
    assert verdicts.filter(benchmark="lab")["value"].n_unique() > 4
    scorers = [read_table(recipe.folder / "score" / name)["scorer"][0] for name in ("", "everywhere")]
    assert scorers == ["lab:lists-reward", "lab:lists-reward-all"]


def test_rates_are_shares_of_pairs_and_those_within_a_form_differ_in_right_items_alone() -> None:
    def verdict(quality: float, terse: float) -> list_verdicts.Verdict:
        return list_verdicts.Verdict(
            quality, "good", {"terse": terse, "rambling": 0.0, "wrong-language": 0.0}
        )

    pools = Pools([("p", "en")], [], [], [[verdict(1.0, 0.0), verdict(0.8, 0.0), verdict(0.6, 0.4)]])
    scores = np.array([[2.0, 3.0, 1.0]])
    assert rates(pools, scores, within_form=False).tolist() == pytest.approx([2 / 3])
    assert rates(pools, scores, within_form=True).tolist() == [0.0]
    assert by_language(pools.keys, [0.25], ["en"]) == {"en": 0.25}
    assert Gate("x", {"en": 0.7, "de": 0.6}, least=0.65).met is False
