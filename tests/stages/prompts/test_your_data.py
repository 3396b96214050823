"""The page about your data: its recipes load, its reward function scores."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from croco.config.load import from_dict, merged
from croco.config.models import Reward
from croco.config.runtime import Runtime
from croco.stages.score.reward import open_reward

PAGE = (Path(__file__).parents[3] / "docs" / "guide" / "your-data.md").read_text(encoding="utf-8")
RECIPE = {
    "run": {"name": "x", "languages": ["da"]},
    "policy": {"model": "Qwen/Qwen3-0.6B"},
    "prompts": {"source": "prompts.jsonl"},
    "evaluation": {"source": "test.jsonl"},
    "reward": {"model": "lab:reward"},
    "arms": {"a": {}},
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", blocks("toml"))
def test_its_recipes_load(block: str) -> None:
    recipe = from_dict(merged(RECIPE, tomllib.loads(block)))
    assert recipe.prompts.source != "lab"


def test_its_reward_function_scores(tmp_path: Path) -> None:
    (block,) = blocks("python")
    (tmp_path / "rewards.py").write_text(block)
    score, _ = open_reward(Reward(function=f"{tmp_path}/rewards.py:brevity"), Runtime())
    row = {"prompt_id": "p", "language": "da", "sample_id": 0, "completion": "x" * 500}
    assert score([([{"role": "user", "content": "Q"}], [row])]) == [[-0.5]]
