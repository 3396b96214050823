"""The vLLM engine itself: what its completions and scores are, and what it refuses."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from conftest import TinyModels
from croco.config.models import Policy, Reward
from croco.config.runtime import Vllm
from croco.config.training import Lora
from croco.errors import UserError
from croco.models.chat_template import prompt_ids
from croco.models.loading import load_policy, load_reward
from croco.models.lora import apply_lora
from croco.models.openai_server import ServerSampler
from croco.models.protocols import Decoding, Request, ScoreRequest
from croco.models.transformers import HFSampler, HFScorer
from croco.models.vllm import open_policy, open_reward
from tiny import make_policy, make_tokenizer, save
from with_vllm.wide import WIDTH, engines_of

EAGER = Vllm(enforce_eager=True)
LORA = Lora(rank=4, alpha=8, dropout=0.0)
GREEDY = Decoding(0.0, 1.0, 0, 24)


def make_adapter(folder: Path, size: float, hidden: int = WIDTH) -> Path:
    """An adapter whose second half is normal with this deviation; the smaller, the less it changes."""
    model = apply_lora(make_policy("llama", hidden=hidden), LORA, seed=3)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, size)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "adapter", 0.1)


@pytest.fixture(scope="module")
def opened(wide_models: TinyModels, adapter: Path) -> tuple[ServerSampler, Any]:
    """The policy with an adapter, in vLLM."""
    return open_policy(Policy(model=str(wide_models.policy)), EAGER, seed=7, adapter=adapter)


def requests(tokenizer: Any, num_seeds: int) -> list[Request]:
    texts = ["Which month is it?", "Hvilken måned er det?", "Ja", "Write one short sentence."]
    ids = [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    return [Request(10 + key, one, list(range(num_seeds))) for key, one in enumerate(ids)]


def test_greedy_with_an_adapter_is_what_the_merged_model_says(
    opened: tuple[ServerSampler, Any], wide_models: TinyModels, adapter: Path
) -> None:
    sampler, tokenizer = opened
    ours = dict(sampler.sample(requests(tokenizer, 2), GREEDY))
    merged = HFSampler(*load_policy(str(wide_models.policy), adapter=adapter))
    bare = HFSampler(*load_policy(str(wide_models.policy)))
    wanted = dict(merged.sample(requests(tokenizer, 1), GREEDY))
    for key, (theirs,) in wanted.items():
        assert [one.ids for one in ours[key]] == [theirs.ids] * 2
        assert {one.finish_reason for one in ours[key]} == {theirs.finish_reason}
    assert wanted != dict(bare.sample(requests(tokenizer, 1), GREEDY))


def test_completions_end_as_in_the_transformers_engine(opened: tuple[ServerSampler, Any]) -> None:
    sampler, tokenizer = opened
    drawn = [
        one
        for _, found in sampler.sample(requests(tokenizer, 96), Decoding(1.0, 1.0, 0, 30))
        for one in found
    ]
    assert len(drawn) == 4 * 96
    assert len({tuple(one.ids) for one in drawn}) > 0.9 * len(drawn)
    for one in drawn:
        assert tokenizer.eos_token_id not in one.ids
        assert len(one.ids) == 30 if one.finish_reason == "length" else len(one.ids) < 30
        assert one.seed == sampler.seed
    assert 0 < sum(one.finish_reason == "stop" for one in drawn) < len(drawn)


def test_samples_follow_the_distribution(
    opened: tuple[ServerSampler, Any], wide_models: TinyModels, adapter: Path
) -> None:
    """First tokens of 4,000 completions against the merged model's probabilities, with top-k and a temperature."""
    sampler, tokenizer = opened
    ids = requests(tokenizer, 1)[0].prompt_ids
    ((_, drawn),) = sampler.sample([Request(0, ids, list(range(4000)))], Decoding(0.7, 1.0, 5, 2))
    first = [one.ids[0] if one.ids else tokenizer.eos_token_id for one in drawn]
    model, _ = load_policy(str(wide_models.policy), adapter=adapter)
    with torch.inference_mode():
        top = (model(torch.tensor([ids])).logits[0, -1] / 0.7).topk(5)
    probabilities = dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))
    assert set(first) <= set(probabilities)
    for token, p in probabilities.items():
        assert first.count(token) / 4000 == pytest.approx(p, abs=5 * (p * (1 - p) / 4000) ** 0.5)


def test_a_stop_string_ends_a_completion_and_is_left_out(opened: tuple[ServerSampler, Any]) -> None:
    sampler, tokenizer = opened
    decoding = Decoding(1.0, 1.0, 0, 40, stop=("a", "e"))
    drawn = [one for _, found in sampler.sample(requests(tokenizer, 32), decoding) for one in found]
    stopped = [one for one in drawn if one.num_tokens is not None]
    assert len(stopped) > 0.2 * len(drawn)
    for one in drawn:
        assert not set("ae") & set(tokenizer.decode(one.ids, skip_special_tokens=True))
    for one in stopped:
        assert one.finish_reason == "stop"
        assert len(one.ids) < one.num_tokens <= 40


def test_a_stream_that_nobody_reads_on_leaves_nothing_behind(opened: tuple[ServerSampler, Any]) -> None:
    sampler, tokenizer = opened
    stream = sampler.sample(requests(tokenizer, 8), Decoding(1.0, 1.0, 0, 200))
    next(stream)
    stream.close()
    assert {key for key, _ in sampler.sample(requests(tokenizer, 2), GREEDY)} == {10, 11, 12, 13}


def test_what_vllm_cannot_do_is_said(
    opened: tuple[ServerSampler, Any], wide_models: TinyModels, tmp_path: Path
) -> None:
    sampler, tokenizer = opened
    for temperature in (0.001, 3.0):
        with pytest.raises(UserError, match=f"temperature {temperature}: vLLM takes 0 and 0.01 to 2.0"):
            list(sampler.sample(requests(tokenizer, 2), Decoding(temperature, 1.0, 0, 4)))
    with pytest.raises(UserError, match=r"max_tokens"):
        list(sampler.sample([Request(3, [5] * 512, [1], name="prompt 'p'")], GREEDY))
    policy = Policy(model=str(wide_models.policy))
    with pytest.raises(UserError, match=r"changes nothing in vLLM"):
        open_policy(policy, EAGER, 0, adapter=make_adapter(tmp_path / "idle", 1e-30))
    with pytest.raises(UserError, match=r"does not fit this LlamaForCausalLM"):
        open_policy(policy, EAGER, 0, adapter=make_adapter(tmp_path / "other", 0.1, hidden=64))
    with pytest.raises(UserError, match=r"holds no adapter"):
        open_policy(policy, EAGER, 0, adapter=tmp_path)
    with pytest.raises(UserError, match=r"per_request_seeds is true, but without a GPU"):
        open_policy(policy, Vllm(per_request_seeds=True), 0)


def test_what_is_no_model_for_vllm_is_one_sentence(wide_models: TinyModels, tmp_path: Path) -> None:
    before = engines_of(os.getpid())
    with pytest.raises(UserError, match=r"^model 'nobody/nothing': its tokenizer does not load"):
        open_policy(Policy(model="nobody/nothing"), EAGER, 0)
    with pytest.raises(UserError, match=r"vLLM's server did not start: .*max_model_len \(600\)"):
        open_policy(Policy(model=str(wide_models.policy)), Vllm(max_model_len=600), 0)
    broken = save(tmp_path / "broken", make_policy("llama", hidden=WIDTH), make_tokenizer())
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(
        UserError, match=re.escape(f"model '{broken}': vLLM's server did not start: ")
    ) as found:
        open_policy(Policy(model=str(broken)), EAGER, 0)
    assert "\n" not in str(found.value)
    assert engines_of(os.getpid()) == before


def test_scores_are_the_raw_logits_of_transformers(wide_models: TinyModels) -> None:
    """Lengths up to the limit, padding at the end, and a prompt given apart from its completions."""
    rng = random.Random(1)
    asked = []
    for key in range(40):
        prompt = [rng.randrange(3, 320) for _ in range(rng.randrange(1, 60))]
        ends = [[rng.randrange(3, 320) for _ in range(rng.randrange(1, 120))] for _ in range(4)]
        asked.append(ScoreRequest(key, prompt, [*ends, ends[0] + [0, 0], [5] * (200 - len(prompt))]))
    scorer, _ = open_reward(Reward(model=str(wide_models.reward), max_tokens=200), EAGER)
    found = scorer.score(asked)
    wanted = HFScorer(*load_reward(str(wide_models.reward))).score(asked)
    largest = max(
        abs(a - b)
        for ours, theirs in zip(found, wanted, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    print(f"largest difference of {len(asked) * 6} scores: {largest:.1e}")
    assert largest < 1e-4
    assert max(abs(score) for scores in wanted for score in scores) > 1  # a sigmoid's would not be
    assert scorer.max_context == 200
    assert scorer.score([]) == []
