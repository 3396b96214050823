"""A real model on the engines: vLLM gives greedily what transformers gives."""

from __future__ import annotations

import gzip
import json

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

import real
from croco.config.models import Policy
from croco.config.runtime import Vllm
from croco.models.chat_template import prompt_ids
from croco.models.loading import load_policy
from croco.models.protocols import Decoding, Request
from croco.models.transformers import HFSampler
from croco.models.vllm import open_policy

PROMPTS = real.ROOT / "recipes" / "everyday-dev.jsonl.gz"


def test_smollm2_on_vllm_says_what_it_says_on_transformers() -> None:
    """Greedy, three everyday prompts in eight languages; then samples, whose ends are the model's own."""
    policy = Policy(model=str(real.smollm2(fetched=True)), dtype="float32")
    with gzip.open(PROMPTS, "rt", encoding="utf-8") as lines:
        asked = [json.loads(line)["messages"] for line, _ in zip(lines, range(24), strict=False)]
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
