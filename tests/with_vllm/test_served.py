"""vLLM's own server of the tiny policy: what our tests of the engine "server" may rely on."""

from __future__ import annotations

import json
import urllib.request

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from croco.models.loading import load_policy
from croco.models.protocols import Decoding, Request
from croco.models.transformers import HFSampler
from vllm_server import Server


def ask(server: Server, path: str, **body: object) -> dict:
    data = json.dumps({"model": server.name, **body}).encode() if body else None
    asked = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as response:
        return json.load(response)


def test_it_serves_the_policy_token_by_token(served_policy: Server) -> None:
    (card,) = ask(served_policy, "/models")["data"]
    assert (card["id"], card["max_model_len"]) == ("policy", 512)
    ids = [1, 4, 40, 41, 2, 5]
    found = ask(
        served_policy, "/completions", prompt=ids, max_tokens=20, temperature=0, return_token_ids=True
    )
    sampler = HFSampler(*load_policy(str(served_policy.model)))
    ((_, (wanted,)),) = sampler.sample([Request(0, ids, [0])], Decoding(0.0, 1.0, 0, 20))
    (choice,) = found["choices"]
    assert choice["finish_reason"] == wanted.finish_reason
    assert choice["token_ids"] == wanted.ids + [2] * (wanted.finish_reason == "stop")
    assert found["usage"]["prompt_tokens"] == len(ids)
