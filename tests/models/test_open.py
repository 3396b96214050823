"""Which engine a role gets where the recipe leaves it open, and what vLLM does otherwise for one role."""

import sys
from pathlib import Path

import pytest
import torch

from croco.config.load import from_dict
from croco.config.runtime import Runtime
from croco.models.memory import free_bytes
from croco.models.open import engine_of, engines
from croco.pipeline.node import Node, Stage
from croco.pipeline.run import run_node


def test_the_engine_of_a_role_says_why() -> None:
    auto = Runtime.model_validate({"vllm": {"python": sys.executable}})
    if torch.cuda.is_available():
        assert engine_of(auto, "sample") == ("vllm", "there is a GPU, and vLLM")
    else:
        assert engine_of(auto, "sample") == ("transformers", "there is no GPU")
    assert engine_of(auto.model_copy(update={"device": "cpu"}), "score")[0] == "transformers"
    named = Runtime.model_validate({"device": "cpu", "engines": {"judge": "vllm"}})
    assert engine_of(named, "judge") == ("vllm", "the recipe says so")
    recipe = {"run": {"name": "x", "languages": ["da"]}, "arms": {"a": {}}, "runtime": named.model_dump()}
    assert list(engines(from_dict(recipe))) == [
        "transformers for sample, score, evaluate (the device is cpu)"
    ]
    assert list(engines(from_dict(recipe | {"judge": {"model": "lab:policy"}}))) == [
        "transformers for sample, score, evaluate (the device is cpu)",
        "vllm for judge (the recipe says so)",
    ]


def test_a_role_has_settings_of_its_own() -> None:
    vllm = Runtime.model_validate(
        {"vllm": {"tensor_parallel": 1, "enforce_eager": True, "roles": {"judge": {"tensor_parallel": 4}}}}
    ).vllm
    assert (vllm.of("judge").tensor_parallel, vllm.of("sample").tensor_parallel) == (4, 1)
    assert vllm.of("judge").enforce_eager


def test_memory_that_torch_keeps_of_a_gpu_is_given_back_before_it_is_counted_and_after_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After sampling, most of a GPU was reserved: tuning was refused, or planned for what was left."""
    reserved = [60]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: reserved.append(0))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (80 - reserved[-1], 80))
    assert free_bytes(torch.device("cuda")) == 80
    reserved.append(60)
    toy = Stage("numbered", 1, "toy_stages:numbered", "prompts")
    run_node(Node(toy, None, tmp_path / "numbered", {"count": 3}, {}), Runtime(), lambda line: None)
    assert reserved[-1] == 0
