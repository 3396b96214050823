"""Scores in batches with shared prefixes against transformers' own forward, one conversation at a time."""

import pytest
import torch

from croco.engines.base import ScoreRequest
from croco.engines.hf import HFScorer
from croco.scoring import classifier, prefix_forward
from tiny import make_policy, make_reward, make_tokenizer


def requests(prompt_in_completions: bool = False, longest: int = 20) -> list[ScoreRequest]:
    torch.manual_seed(3)

    def ids(low: int, high: int) -> list[int]:
        return torch.randint(3, 320, (int(torch.randint(low, high, ())),)).tolist()

    made = []
    for key in range(8):
        prompt, completions = ids(2, 40), [ids(1, longest) for _ in range(6)]
        if prompt_in_completions:
            prompt, completions = [], [prompt + completion for completion in completions]
        made.append(ScoreRequest(key, prompt, completions))
    return made


def one_by_one(model, asked):
    with torch.inference_mode():
        return torch.tensor(
            [
                [model(torch.tensor([request.prompt_ids + ids])).logits[0, 0] for ids in request.completions]
                for request in asked
            ]
        )


@pytest.mark.parametrize("arch", ["qwen3", "llama"])
@pytest.mark.parametrize("token_budget", [50, 400, 10_000])
@pytest.mark.parametrize("declared", [True, False])
def test_equals_one_by_one(arch, token_budget, declared):
    model, asked = make_reward(arch, layers=3), requests(prompt_in_completions=not declared)
    scorer = HFScorer(model, make_tokenizer(), token_budget)
    assert scorer.facts["scorer"] == "shared-prefix"
    found = torch.tensor(scorer.score(asked))
    expected = one_by_one(model, asked)
    assert expected.std() > 0.05
    assert (found - expected).abs().max() < 1e-5


def test_prefixes_are_really_shared(monkeypatch):
    model, asked = make_reward("qwen3"), requests(prompt_in_completions=True)
    computed = []
    monkeypatch.setattr(
        prefix_forward, "_padded", lambda rows, device, padded=prefix_forward._padded: (
            computed.append(sum(map(len, rows))),
            padded(rows, device),
        )[1],
    )  # fmt: skip
    classifier.logits(model, asked, 400)
    whole = sum(len(ids) for request in asked for ids in request.completions)
    assert sum(computed) < 0.55 * whole


def test_whole_sequences_give_the_same_where_sharing_is_not_known_to_be_exact():
    model, asked = make_reward("llama", spread=0.3), requests()
    model.config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
    }  # after it was built: for the guard
    assert not prefix_forward.can_share(model.model)
    found = torch.tensor(classifier.logits(model, asked, 400))
    assert (found - one_by_one(model, asked)).abs().max() < 1e-5


@pytest.mark.parametrize("arch", ["llama", "qwen3", "cohere2"])
def test_shared_prefixes_are_exact_in_double_precision_sliding_windows_too(arch):
    model = make_policy(arch, layers=4, spread=0.3).model.double()
    groups = [prefix_forward.Group(request.prompt_ids, request.completions) for request in requests()]
    done = set()
    with torch.inference_mode():
        for rows, output in prefix_forward.forward(model, groups, 400):
            for line, (g, i) in enumerate(rows):
                whole = model(torch.tensor([groups[g].prefix + groups[g].rests[i]])).last_hidden_state[0]
                own = whole[len(groups[g].prefix) :]
                assert (output.last_hidden_state[line, : len(own)] - own).abs().max() < 1e-8
                done.add((g, i))
    assert len(done) == 48


def test_the_score_is_read_where_transformers_reads_it_when_padding_ends_a_conversation():
    model, pad = make_reward("qwen3", spread=0.3), 0
    asked = [ScoreRequest(0, [5, 6, 7], [[8, 9, pad], [8, pad, pad], [pad], [8, pad, 9]])]
    found = torch.tensor(classifier.logits(model, asked, 400))
    assert (found - one_by_one(model, asked)).abs().max() < 1e-5


def test_out_of_memory_halves_the_budget(monkeypatch):
    model, asked = make_reward("qwen3"), requests()
    scorer, attend = HFScorer(model, make_tokenizer(), 1000), prefix_forward._behind

    def short_of_memory(network, ids_BT, *rest):
        if ids_BT.numel() > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return attend(network, ids_BT, *rest)

    monkeypatch.setattr(prefix_forward, "_behind", short_of_memory)
    assert (torch.tensor(scorer.score(asked)) - one_by_one(model, asked)).abs().max() < 1e-5
    assert scorer.token_budget == 250


def test_a_classifier_that_is_not_what_it_seems_is_scored_one_by_one(caplog):
    model = make_reward("qwen3", spread=0.3)
    model.score.register_forward_hook(
        lambda head, args, logits: logits + args[0].shape[1] * 0.1
    )  # of whole rows
    scorer = HFScorer(model, make_tokenizer())
    assert "differs from a plain forward's" in str(scorer.facts["reason"])
    assert "conversation by conversation" in caplog.text
    assert (torch.tensor(scorer.score(requests())) - one_by_one(model, requests())).abs().max() < 1e-6
