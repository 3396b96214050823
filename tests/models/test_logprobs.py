"""The policy's own log-probabilities against a slow twin: one completion, one plain forward, one token at a time."""

import pytest
import torch

from croco.config.training import Lora
from croco.models import output_layer
from croco.models.logprobs import completion_logps
from croco.models.lora import apply_lora
from croco.models.protocols import ScoreRequest
from croco.models.transformers import HFLikelihood
from croco.stages.score.policy_logprobs import score_likelihood
from models.test_output_layer import Largest
from tiny import make_policy, make_tokenizer


def twin(model, prompt: list[int], completion: list[int]) -> list[float]:
    with torch.inference_mode():
        logps = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
    return [logps[len(prompt) - 1 + place, token].item() for place, token in enumerate(completion)]


@pytest.mark.parametrize("arch", ["llama", "cohere2", "qwen3", "gemma3"])
def test_equals_its_twin(arch):
    model, tokenizer = make_policy(arch, layers=4, spread=0.3), make_tokenizer()
    torch.manual_seed(2)
    asked, ended = [], []
    for key in range(6):
        lengths = torch.randint(0, 15, (5,)).tolist()
        prompt = torch.randint(3, 320, (4 + 5 * key,)).tolist()
        asked.append(ScoreRequest(key, prompt, [torch.randint(3, 320, (n,)).tolist() for n in lengths]))
        ended.append([n % 2 == 0 for n in lengths])  # an empty completion is its end token
    found = HFLikelihood(model, tokenizer, token_budget=200).score(asked, ended)
    sums = completion_logps(model, tokenizer, asked, ended, token_budget=200)
    assert HFLikelihood(model, tokenizer, token_budget=200, mean=False).score(asked, ended) == sums
    for k, request in enumerate(asked):
        for i, ids in enumerate(request.completions):
            logps = twin(model, request.prompt_ids, ids + [2] * ended[k][i])
            assert sums[k][i] == pytest.approx(sum(logps), abs=1e-4)
            assert found[k][i] == pytest.approx(sum(logps) / len(logps), abs=1e-5)


@pytest.mark.parametrize("way", ["stored", "whole"])
def test_logits_of_a_long_completion_never_exist_at_once(way):
    """However few tokens a large vocabulary leaves to a budget of logits, one sequence may have more."""
    model = make_policy("gemma3", vocab_size=20_000, max_positions=1024, sliding_window=1024)
    torch.manual_seed(0)
    asked = [ScoreRequest(0, [5] * 300, [torch.randint(3, 20_000, (500,)).tolist(), [7, 8]])]
    with Largest() as largest:
        found = completion_logps(model, make_tokenizer(), asked, token_budget=2048, way=way)
    assert 20_000 * 32 <= largest.most <= 2**21 < 500 * 20_000  # at least the embeddings
    for ids, value in zip(asked[0].completions, found[0], strict=True):
        assert value == pytest.approx(sum(twin(model, asked[0].prompt_ids, [*ids, 2])), rel=1e-5)


def test_an_unknown_head_keeps_all_logits_within_a_budget(monkeypatch):
    model = make_policy("llama", vocab_size=4000)
    asked = [ScoreRequest(k, [5 + k, 6], [[7, 8, 9 + i] for i in range(20)]) for k in range(3)]
    known = completion_logps(model, make_tokenizer(), asked)
    monkeypatch.setattr(output_layer, "HEADS", ())
    monkeypatch.setattr(output_layer, "_ALL_LOGITS", 20 * 4000)
    with Largest() as largest:
        found = completion_logps(model, make_tokenizer(), asked)
    assert largest.most <= 32 * 4000
    torch.testing.assert_close(torch.tensor(found), torch.tensor(known), rtol=1e-5, atol=1e-5)


def test_an_adapter_is_in_what_the_output_layer_reads():
    model = apply_lora(make_policy("llama", spread=0.3), Lora(rank=4, alpha=8, dropout=0.0), 0).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    ((value,),) = completion_logps(model, make_tokenizer(), [ScoreRequest(0, [5, 6, 7], [[8, 9]])])
    assert value == pytest.approx(sum(twin(model, [5, 6, 7], [8, 9, 2])), abs=1e-4)
    with model.disable_adapter():
        assert abs(value - sum(twin(model, [5, 6, 7], [8, 9, 2]))) > 0.1


def test_without_word_every_completion_is_closed_by_the_end_token():
    model = make_policy("llama", spread=0.3)
    ((value,),) = completion_logps(model, make_tokenizer(), [ScoreRequest(0, [5, 6, 7], [[8, 9]])])
    assert value == pytest.approx(sum(twin(model, [5, 6, 7], [8, 9, 2])), abs=1e-5)


def test_a_completion_without_tokens_and_end_has_a_reason_instead_of_a_score():
    """A server of messages gives such ones, where all tokens went into thoughts."""
    tokenizer = make_tokenizer()
    scorer, messages = HFLikelihood(make_policy("llama"), tokenizer), [{"role": "user", "content": "Which?"}]
    row = {"prompt_id": "p", "language": "en", "completion_ids": None, "finish_reason": "length"}
    rows = [
        row | {"completion": ""},
        row | {"completion": "April"},
        row | {"completion": "", "finish_reason": "stop"},
    ]
    ((nothing, *numbers),) = score_likelihood(scorer, tokenizer, [(messages, rows)], {})
    assert nothing == "the completion has no tokens and no end"
    assert all(number < 0 for number in numbers)
