"""What the tests with vLLM share: tiny models of a shape that its CPU kernels take, and a real server of one.

The folder is not called `vllm`, because `tests` is on the path and TRL would take it for the package.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

import tiny
from conftest import TinyModels, write_prompts
from vllm_server import Server, serve
from with_vllm.wide import WIDTH

collect_ignore_glob = (
    [] if find_spec("vllm") else ["test_*.py"]
)  # `make test-vllm` has an environment for them

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, of each engine
os.environ.setdefault(
    "VLLM_CPU_OMP_THREADS_BIND", "nobind"
)  # several engines, and each would take the same core


@pytest.fixture(scope="session")
def wide_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """A Llama policy and a Qwen3 reward model for vLLM, with the prompts of `tiny_models`."""
    folder = tmp_path_factory.mktemp("wide-models")
    tokenizer = tiny.make_tokenizer()
    return TinyModels(
        policy=tiny.save(folder / "policy", tiny.make_policy("llama", hidden=WIDTH), tokenizer),
        reward=tiny.save(folder / "reward", tiny.make_reward("qwen3", hidden=WIDTH), tokenizer),
        prompts=write_prompts(folder / "prompts.jsonl", 10),
        test_prompts=write_prompts(folder / "test.jsonl", 4, start=100),
    )


@pytest.fixture(scope="session")
def served_policy(wide_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """vLLM's own server of the policy on a loopback port, under the name "policy"."""
    with serve(wide_models.policy, "policy", tmp_path_factory.mktemp("server") / "log.txt") as server:
        yield server


@pytest.fixture(scope="session")
def served_reward(wide_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """vLLM's own server of the reward model on a loopback port, under the name "reward"."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with serve(wide_models.reward, "reward", log, "--runner", "pooling") as server:
        yield server
