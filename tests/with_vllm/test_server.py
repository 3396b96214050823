"""The engine "server" against the real vLLM server: the tests of `tests/engines/test_server.py` whose own server only
stands in for it, and what that one does not have: stop strings, adapters, an engine with opinions.

Chunked prefill is off because a seeded request that is prefilled in parts kills vLLM's CPU engine.
"""

# ruff: noqa: F401, F811  (tests and a fixture of the other file run here with the fixtures of this one)
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import torch

from conftest import TinyModels, write_prompts, write_recipe
from croco.config.load import load
from croco.config.training import Lora
from croco.models.loading import load_policy
from croco.models.lora import apply_lora
from croco.models.open import open_sampler
from croco.models.protocols import Decoding, Request
from models.test_openai_server import (
    calm,
    sampled,
    server_recipe,
    test_a_prompt_longer_than_the_context_goes_to_the_ledger,
    test_a_server_that_keeps_failing_stops_the_stage_which_goes_on_later,
    test_killed_again_and_again_it_goes_on,
    test_no_fault_loses_or_doubles_a_row,
    test_scores_are_the_raw_logits_whatever_the_network_does,
)
from tiny import make_policy, make_reward, make_tokenizer, save
from vllm_server import Server, serve


@pytest.fixture(scope="module")
def patience() -> float:
    return 10.0


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Like those of the other tests, but wide enough for vLLM's CPU kernels."""
    folder, tokenizer = tmp_path_factory.mktemp("tiny-models"), make_tokenizer()
    return TinyModels(
        policy=save(folder / "policy", make_policy("llama", hidden=128, spread=0.08), tokenizer),
        reward=save(folder / "reward", make_reward("qwen3", hidden=128, spread=0.08), tokenizer),
        prompts=write_prompts(folder / "prompts.jsonl", 10),
        test_prompts=write_prompts(folder / "test.jsonl", 4, start=100),
    )


@pytest.fixture(scope="module")
def adapter(tiny_models: TinyModels) -> Path:
    """An adapter as training writes it, far enough from the identity to be seen."""
    policy, _ = load_policy(str(tiny_models.policy))
    model = apply_lora(policy, Lora(rank=4, alpha=8, dropout=0.0), seed=3)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.3)
    folder = tiny_models.policy.parent / "train" / "monolingual" / "adapter"
    folder.parent.mkdir(parents=True)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(tiny_models: TinyModels, adapter: Path) -> Iterator[Server]:
    """vLLM's server of the policy and an adapter, under the folder's name as the stand-in has it."""
    options = ["--no-enable-chunked-prefill", "--enable-lora", "--max-lora-rank", "8", "--lora-modules"]
    name, log = str(tiny_models.policy), tiny_models.policy.with_suffix(".log")
    with serve(tiny_models.policy, name, log, *options, f"tuned={adapter}") as server:
        yield server


@pytest.fixture(scope="module")
def scoring(tiny_models: TinyModels) -> Iterator[str]:
    log = tiny_models.reward.with_suffix(".log")
    with serve(tiny_models.reward, str(tiny_models.reward), log, "--runner", "pooling") as server:
        yield server.url


def test_greedy_is_that_of_transformers_with_and_without_an_adapter(
    served: Server, adapter: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    there = server_recipe(
        tmp_path, tiny_models, served.url, "runtime.servers.evaluate.adapters.monolingual=tuned"
    )
    here = load(write_recipe(tmp_path, tiny_models))
    requests = [Request(key, [1, 4, 20 + key, 2, 5], [0]) for key in range(12)]
    drawn = {}
    for put_on in (None, adapter):
        for where, recipe in (("there", there), ("here", here)):
            sampler, _ = open_sampler("evaluate", recipe.policy, recipe.runtime, 0, adapter=put_on)
            found = dict(sampler.sample(requests, Decoding(0.0, 1.0, 0, 24)))
            drawn[where, put_on] = [found[key][0].ids for key in range(12)]
        same = [a == b for a, b in zip(drawn["there", put_on], drawn["here", put_on], strict=True)]
        assert sum(same) >= 11  # a near-tie may fall the other way
    assert drawn["there", None] != drawn["there", adapter]


def test_a_stop_string_cuts_ids_as_in_process(
    served: Server, tiny_models: TinyModels, tmp_path: Path
) -> None:
    requests = [Request(key, [1, 4, 20 + key, 2, 5], [0]) for key in range(30)]
    drawn = {}
    for recipe in (
        server_recipe(tmp_path, tiny_models, served.url),
        load(write_recipe(tmp_path, tiny_models)),
    ):
        sampler, tokenizer = open_sampler("sample", recipe.policy, recipe.runtime, 0)
        found = dict(sampler.sample(requests, Decoding(0.0, 1.0, 0, 24, ("e", "Qu"))))
        drawn[sampler.facts["engine"]] = [
            (one.ids, one.finish_reason, one.completion_tokens) for key in range(30) for one in found[key]
        ]
    assert sum(a == b for a, b in zip(drawn["server"], drawn["transformers"], strict=True)) >= 28  # near-ties
    texts = [tokenizer.decode(ids) for ids, _, _ in drawn["server"]]
    assert not any("e" in text or "Qu" in text for text in texts)
    assert sum(reason == "stop" for _, reason, _ in drawn["server"]) > 10


def test_the_chat_api_draws_what_token_ids_draw(
    served: Server,
    calm: pl.DataFrame,
    tiny_models: TinyModels,
    tmp_path: Path,
) -> None:
    found = sampled(server_recipe(tmp_path, tiny_models, served.url, api="chat"))
    same = ["prompt_id", "language", "sample_id", "completion_tokens", "finish_reason", "seed"]
    assert found.select(same).equals(calm.select(same))
    # vLLM keeps back a character that the last token leaves unfinished
    texts = [column.str.strip_chars_end("\ufffd") for column in (found["completion"], calm["completion"])]
    assert texts[0].equals(texts[1])
