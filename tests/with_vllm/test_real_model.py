"""A real model on the engines: vLLM gives greedily what transformers gives."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

import real
from croco.config.models import Policy
from croco.config.runtime import Runtime, Vllm
from croco.models.chat_template import prompt_ids
from croco.models.loading import load_policy
from croco.models.open import open_sampler
from croco.models.protocols import Decoding, Request
from croco.models.transformers import HFSampler
from croco.models.vllm import open_policy
from vllm_server import serve

PROMPTS = real.ROOT / "recipes" / "everyday-dev.jsonl.gz"


def prompts(count: int) -> list[list[dict[str, str]]]:
    with gzip.open(PROMPTS, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["messages"] for line, _ in zip(lines, range(count), strict=False)]


def test_smollm2_on_vllm_says_what_it_says_on_transformers() -> None:
    """Greedy, three everyday prompts in eight languages; then samples, whose ends are the model's own."""
    policy = Policy(model=str(real.smollm2(fetched=True)), dtype="float32")
    asked = prompts(24)
    sampler, tokenizer = open_policy(policy, Vllm(enforce_eager=True, max_model_len=512), seed=7)
    requests = [Request(key, prompt_ids(tokenizer, one), [0]) for key, one in enumerate(asked)]
    greedy = Decoding(0.0, 1.0, 0, 32)
    ours = {key: (one.ids, one.finish_reason) for key, (one,) in sampler.sample(requests, greedy)}
    theirs = HFSampler(*load_policy(policy.model, dtype="float32", device="cpu"))
    wanted = {key: (one.ids, one.finish_reason) for key, (one,) in theirs.sample(requests, greedy)}
    assert ours == wanted
    assert {reason for _, reason in wanted.values()} == {"stop", "length"}
    many = [Request(key, prompt_ids(tokenizer, one), list(range(8))) for key, one in enumerate(asked)]
    drawn = [one for _, found in sampler.sample(many, Decoding(1.0, 1.0, 0, 48)) for one in found]
    assert len(drawn) == 24 * 8
    assert all(tokenizer.eos_token_id not in one.ids for one in drawn)
    assert 0 < sum(one.finish_reason == "stop" for one in drawn) < len(drawn)


def test_smollm2_on_a_server_says_what_it_says_on_transformers(tmp_path: Path) -> None:
    """The engine "server", greedy, one everyday prompt in eight languages."""
    model = real.smollm2(fetched=True)
    policy = Policy(model=str(model), dtype="float32")
    options = ["--no-enable-chunked-prefill", "--max-model-len", "512"]
    with serve(model, str(model), tmp_path / "server.txt", *options) as server:
        there = Runtime.model_validate(
            {"engines": {"sample": "server"}, "servers": {"sample": {"url": server.url}}}
        )
        sampler, tokenizer = open_sampler("sample", policy, there, 0)
        requests = [Request(key, prompt_ids(tokenizer, one), [0]) for key, one in enumerate(prompts(8))]
        greedy = Decoding(0.0, 1.0, 0, 32)
        served = {key: (one.ids, one.finish_reason) for key, (one,) in sampler.sample(requests, greedy)}
    assert sampler.facts["engine"] == "server"
    here = HFSampler(*load_policy(policy.model, dtype="float32", device="cpu"))
    assert served == {key: (one.ids, one.finish_reason) for key, (one,) in here.sample(requests, greedy)}
