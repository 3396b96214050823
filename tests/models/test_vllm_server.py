"""A policy behind vLLM's server: the merged model, the words, and what is said when it does not start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from croco.config.models import Policy
from croco.config.runtime import Vllm
from croco.config.training import Lora
from croco.errors import UserError
from croco.models import vllm_server
from croco.models.loading import load_policy
from croco.models.lora import apply_lora
from served import Handler, listening
from tiny import make_policy, make_tokenizer, save


def test_a_merged_model_is_the_policy_with_its_adapter_and_template(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}!", encoding="utf-8")
    policy = make_policy("llama")
    base = save(tmp_path / "policy", policy, make_tokenizer())
    adapted = apply_lora(policy, Lora(rank=2, dropout=0.0), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    section = Policy(model=str(base), chat_template=str(template))
    folder = vllm_server.merge(section, "float32", tmp_path / "adapter", tmp_path / "merged")
    merged, tokenizer = load_policy(str(folder))
    wanted, _ = load_policy(str(base), adapter=tmp_path / "adapter")
    ids = torch.tensor([tokenizer("Hej med dig")["input_ids"]])
    with torch.inference_mode():
        assert torch.equal(merged(ids).logits, wanted(ids).logits)
        assert not torch.allclose(merged(ids).logits, load_policy(str(base))[0](ids).logits)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x!"


def test_the_server_is_told_what_the_recipe_says(tmp_path: Path) -> None:
    policy = Policy(model="org/model", revision="abc", chat_template="t.jinja")
    words = vllm_server.policy_words(policy, None) + vllm_server.vllm_words(Vllm(tensor_parallel=2))
    for option, value in (
        ("--model", "org/model"),
        ("--revision", "abc"),
        ("--chat-template", "t.jinja"),
        ("--tensor-parallel-size", "2"),
    ):
        assert words[words.index(option) + 1] == value
    assert "--gpu-memory-utilization" not in words  # vLLM's own, which is another one on a CPU
    assert vllm_server.policy_words(policy, tmp_path) == ["--model", str(tmp_path)]


class Names(Handler):
    """Serves one model, by name alone."""

    def do_GET(self) -> None:
        self.reply(200, json.dumps({"data": [{"id": "openai/croco-base", "max_model_len": 512}]}).encode())


def test_a_server_that_does_not_start_or_serve_is_one_sentence(tmp_path: Path) -> None:
    policy = Policy()
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no weights found; exit 1\n", encoding="utf-8")
    python.chmod(0o755)
    with (
        pytest.raises(UserError, match="vLLM's server did not start: no weights found"),
        vllm_server.serve(vllm_server.policy_words(policy, tmp_path), "x", "float32", vllm=Vllm(), python=str(python),
                      seconds=60, log=tmp_path / "log.txt"),
    ):  # fmt: skip
        pass
    with (
        listening(Names) as address,
        pytest.raises(UserError, match=r"serves openai/croco-base, not 'openai/croco-x'"),
    ):
        vllm_server.ask_context(f"{address}/v1", "openai/croco-x")
