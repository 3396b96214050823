"""Rewards that are functions, and weighted sums of rewards: from the recipe to the scores table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from conftest import TinyModels, write_recipe
from croco.config.load import load
from croco.config.models import Reward
from croco.config.runtime import Runtime
from croco.errors import UserError
from croco.pipeline import run as pipeline
from croco.pipeline.fingerprint import given_reward
from croco.stages.diagnose.diagnose import diagnose
from croco.stages.score.reward import NO_SCORE, open_reward
from croco.stages.score.score import tabulate
from croco.storage import shards

SOURCE = """
import numpy as np

def length(messages, completions, languages):
    assert all(turns[-1]["role"] == "user" for turns in messages)
    return [float(len(text)) for text in completions]

def danish(messages, completions, languages):
    return np.array([code == "da" for code in languages], np.float32)

def some(messages, completions, languages):
    return [None if text == "b" else 1 for text in completions]

def few(messages, completions, languages):
    return [1.0]

def nothing(messages, completions, languages):
    return None

def huge(messages, completions, languages):
    return [1.0] + [1e300] * (len(completions) - 1)


def undefined(messages, completions, languages):
    return [float("nan") if text == "b" else 1.0 for text in completions]

def words(messages, completions, languages):
    return ["good" for _ in completions]

def raising(messages, completions, languages):
    return [1 / (text != "b") for text in completions]

constant = 3
"""
ASKED = [{"role": "user", "content": "Q"}]


def groups(*texts: str, language: str = "da") -> list[tuple[list[dict[str, str]], list[dict[str, Any]]]]:
    key = {"prompt_id": "p", "language": language}
    return [(ASKED, [{**key, "sample_id": i, "completion": text} for i, text in enumerate(texts)])]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(SOURCE)
    return path


def scored(reward: Reward, *texts: str) -> list[float | str]:
    return open_reward(reward, Runtime())[0](groups(*texts))[0]


def test_a_function_scores_completions(file: Path) -> None:
    assert scored(Reward(function=f"{file}:length"), "a", "bbb") == [1.0, 3.0]
    many = ["x" * (i % 7) for i in range(600)]  # more than a batch
    assert scored(Reward(function=f"{file}:length"), *many) == [float(i % 7) for i in range(600)]
    assert scored(Reward(function=f"{file}:some"), "a", "b") == [1.0, NO_SCORE]


def test_a_function_of_a_module_in_the_current_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    monkeypatch.syspath_prepend(str(file.parent))
    assert scored(Reward(function="rewards:danish"), "a") == [1.0]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("few", "gave 1 scores for 2 completions, expected a list of a number each"),
        ("nothing", "gave NoneType for 2 completions"),
        ("undefined", "gave nan for completion 1 of prompt 'p' in da, expected a finite number or None"),
        ("huge", r"gave 1e\+300 for completion 1 of prompt 'p' in da, expected a finite number"),
        ("words", "gave 'good' for completion 0 of prompt 'p' in da"),
        ("raising", "raised ZeroDivisionError: division by zero for completion 1 of prompt 'p' in da"),
        ("constant", "has no function 'constant'"),
        ("none", "has no function 'none'"),
    ],
)
def test_what_a_function_does_wrong_is_named(name: str, sentence: str, file: Path) -> None:
    with pytest.raises(UserError, match=rf"^reward\.function = '{file}:{name}'.*{sentence}"):
        scored(Reward(function=f"{file}:{name}"), "a", "b")


def test_a_function_that_is_not_there(tmp_path: Path) -> None:
    for name, sentence in (("no.such:f", "no module 'no.such'"), (f"{tmp_path}/x.py:f", "no such file")):
        with pytest.raises(UserError, match=sentence):
            given_reward(Reward(function=name))
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(UserError, match=r"bad\.py cannot be loaded: ModuleNotFoundError"):
        scored(Reward(function=f"{tmp_path}/bad.py:f"), "a")
    with pytest.raises(ValueError, match="expected 'module:name'"):
        Reward(function="length")
    with pytest.raises(ValueError, match="part 1 has no model and no function"):
        Reward.model_validate({"also": [{"weight": 2.0}]})


def test_a_sum_keeps_its_parts(file: Path) -> None:
    also = [{"function": f"{file}:danish", "weight": 10.0}]
    reward = Reward.model_validate({"function": f"{file}:length", "weight": 0.5, "also": also})
    assert reward.name == f"0.5 × {file}:length + 10 × {file}:danish"
    asked = groups("aaaa")
    table, dropped = tabulate(
        [rows for _, rows in asked], open_reward(reward, Runtime())[0](asked), reward.name
    )
    (row,) = table.to_pylist()
    assert row["score"] == 0.5 * 4 + 10
    assert row["parts"] == [
        {"reward": f"{file}:length", "score": 4.0}, {"reward": f"{file}:danish", "score": 1.0}
    ]  # fmt: skip
    assert dropped.num_rows == 0
    partial = Reward.model_validate({"function": f"{file}:length", "also": [{"function": f"{file}:some"}]})
    assert scored(partial, "b") == [f"{file}:some: {NO_SCORE}"]


def test_another_source_is_another_reward(file: Path) -> None:
    before = given_reward(Reward(function=f"{file}:length")).identity
    assert given_reward(Reward(function=f"{file}:length")).identity == before
    assert given_reward(Reward(function=f"{file}:length", weight=2.0)).identity != before
    file.write_text(SOURCE + "\n# another\n")
    assert given_reward(Reward(function=f"{file}:length")).identity != before


def test_a_function_is_diagnosed_on_pairs(file: Path, tmp_path: Path) -> None:
    pairs = [
        {"language": "da", "prompt": "Q", "chosen": "aaa", "rejected": text} for text in ("b", "bbbb", "bb")
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    name = f"{file}:length"
    ranking = diagnose([tmp_path / "pairs.jsonl"], [name], tmp_path / "out")
    accuracy = ranking.filter((pl.col("metric") == "accuracy") & (pl.col("reward") == name))
    assert accuracy["value"].to_list() == [pytest.approx(2 / 3)]


def test_a_run_chooses_by_the_function(file: Path, tmp_path: Path, tiny_models: TinyModels) -> None:
    recipe = load(write_recipe(tmp_path, tiny_models), [f"reward.function={file}:length"])
    pipeline.run(recipe, until="pair")
    pairs = shards.read_table(recipe.folder / "pair" / next(iter(recipe.arms)))
    assert pairs.height
    assert pairs["chosen_score"].to_list() == [float(len(text)) for text in pairs["chosen"]]
    assert (pairs["chosen_score"] > pairs["rejected_score"]).all()
