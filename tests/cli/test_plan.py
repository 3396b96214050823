"""`croco plan --machine`: hours from parameters, tokens and a table of devices, and no guess where nothing is known."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import TinyModels, write_recipe
from croco import load, plan
from croco.cli.main import app
from croco.cli.plan import _pairs_of_a_prompt
from croco.cli.price import Load, machine, parameters, prices
from croco.config.arms import Arm
from croco.config.models import Model
from croco.errors import UserError


def test_a_machine_is_a_count_and_a_device() -> None:
    assert machine("8xh100") == (8, "h100")
    assert machine("A100") == (1, "a100")
    for text in ("", "8", "0xh100", "8 h100", "tpu", "99999xh100"):
        with pytest.raises(UserError, match="expected such as 8xh100"):
            machine(text)


def test_parameters_come_from_the_files_or_the_name(tiny_models: TinyModels) -> None:
    from croco.models.loading import load_policy

    network, _ = load_policy(str(tiny_models.policy))
    total = sum(weight.numel() for weight in network.parameters())
    assert parameters(Model(model=str(tiny_models.policy))) == (total, total)
    for name, size in {
        "Qwen/Qwen3-0.6B": (0.6e9, 0.6e9),
        "google/translategemma-27b-it": (27e9, 27e9),
        "facebook/nllb-200-distilled-600M": (600e6, 600e6),
        "Qwen/Qwen3.6-35B-A3B": (35e9, 3e9),
        "Skywork/Skywork-Reward-V2-Qwen3-8B": (8e9, 8e9),
        "utter-project/EuroLLM-9B-Instruct-2512": (9e9, 9e9),
        "org/model": None,
    }.items():
        assert parameters(Model(model=name)) == size, name


def test_hours_by_hand() -> None:
    model = Model(model="org/model-1B")
    # 1e9 parameters x 2 operations x 1.78e9 tokens at 0.17 of 989 TFLOP/s: 21,173 seconds, on two devices half of it
    loads = [Load("score", "read", model, 1.78e9), Load("train", "train", Model(model="org/unknown"), 5.0)]
    lines = list(prices(loads, 1, (2, "h100"), {}))
    assert lines[0].startswith("on 2 × h100, estimated")
    assert lines[1].split() == ["score", "5.88", "GPU", "hours"]
    assert lines[2].split()[:6] == ["together", "5.88", "GPU", "hours,", "2.9", "hours"]
    assert lines[-1].endswith("how large it is: org/unknown")
    large = Model(model="org/model-70B")
    assert "do not fit in 80 GiB" in "".join(
        prices([Load("sample", "generate", large, 1e9)], 1, (1, "h100"), {})
    )
    assert "do not fit" not in "".join(prices([Load("sample", "generate", large, 1e9)], 4, (1, "h100"), {}))
    measured = list(prices([Load("sample", "generate", model, 3.6e6)], 1, (1, "h100"), {"sample": 1000.0}))
    assert "1.00 GPU hours, at the rate measured" in measured[1]


@pytest.mark.parametrize(
    ("pool", "prompt", "pairs"),
    [("language", "chosen", 10), ("all", "chosen", 2), ("all", "each", 10),
     # two groups, and a language in none, which is a pool of its own
     ({"nordic": ["da", "sv"], "romance": ["fr", "it"]}, "chosen", 6), ({"nordic": ["da", "sv"]}, "each", 10)],
)  # fmt: skip
def test_the_most_pairs_that_a_prompt_gives(pool: str | dict, prompt: str, pairs: int) -> None:
    arm = Arm.model_validate({"pool": pool, "prompt": prompt, "pairs_per_pool": 2})
    assert _pairs_of_a_prompt(arm, ("da", "sv", "fr", "it", "mt")) == pairs


def test_the_plan_of_a_recipe_has_hours_and_no_program_text(tmp_path: Path, tiny_models: TinyModels) -> None:
    path = write_recipe(tmp_path, tiny_models)
    shown = CliRunner().invoke(app, ["plan", str(path), "--machine", "2xa100"])
    assert shown.exit_code == 0, shown.output
    for stage in ("sample", "score", "train", "evaluate", "together"):
        assert any(
            line.split()[0] == stage and "GPU hours" in line for line in shown.output.splitlines() if line
        )
    assert "--machine 8xh100 estimates them" in CliRunner().invoke(app, ["plan", str(path)]).output
    text = repr(plan(load(path)))
    assert "lambda" not in text
    assert "function" not in text
    assert "Node(train/monolingual in" in text
