"""Which engine a role gets where the recipe leaves it open, and what vLLM does otherwise for one role."""

import sys

import torch

from croco.config.runtime import Runtime
from croco.models.open import engine_of, engines


def test_the_engine_of_a_role_says_why() -> None:
    auto = Runtime.model_validate({"vllm": {"python": sys.executable}})
    if torch.cuda.is_available():
        assert engine_of(auto, "sample") == ("vllm", "there is a GPU, and vLLM")
    else:
        assert engine_of(auto, "sample") == ("transformers", "there is no GPU")
    assert engine_of(auto.model_copy(update={"device": "cpu"}), "score")[0] == "transformers"
    named = Runtime.model_validate({"device": "cpu", "engines": {"judge": "vllm"}})
    assert engine_of(named, "judge") == ("vllm", "the recipe says so")
    assert list(engines(named)) == [
        "transformers for translate, sample, score, evaluate (the device is cpu)",
        "vllm for judge (the recipe says so)",
    ]


def test_a_role_has_settings_of_its_own() -> None:
    vllm = Runtime.model_validate(
        {"vllm": {"tensor_parallel": 1, "enforce_eager": True, "roles": {"judge": {"tensor_parallel": 4}}}}
    ).vllm
    assert (vllm.of("judge").tensor_parallel, vllm.of("sample").tensor_parallel) == (4, 1)
    assert vllm.of("judge").enforce_eager
