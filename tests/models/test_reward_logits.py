"""Scores in batches with shared prefixes against transformers' own forward, one conversation at a time."""

import pytest
import torch

from croco.errors import UserError
from croco.models import prefix_forward, proofs, reward_logits
from croco.models.protocols import ScoreRequest
from croco.models.transformers import HFLikelihood, HFScorer
from models.attention.varlen_twin import varlen_twin
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


def test_scores_in_half_precision_are_no_coarser_than_hidden_states():
    model, asked = make_reward("qwen3", hidden=64, layers=3).to(torch.bfloat16), requests()
    found = torch.tensor(HFScorer(model, make_tokenizer()).score(asked))
    expected = one_by_one(model, asked).float()
    assert (found - expected).norm() / expected.norm() < 0.1
    assert (found.bfloat16().float() != found).float().mean() > 0.9


def test_prefixes_are_really_shared(monkeypatch):
    model, asked = make_reward("qwen3"), requests(prompt_in_completions=True)
    computed = []
    monkeypatch.setattr(
        prefix_forward, "_padded", lambda rows, device, padded=prefix_forward._padded: (
            computed.append(sum(map(len, rows))),
            padded(rows, device),
        )[1],
    )  # fmt: skip
    reward_logits.logits(model, asked, 400)
    whole = sum(len(ids) for request in asked for ids in request.completions)
    assert sum(computed) < 0.55 * whole


def test_whole_sequences_give_the_same_where_sharing_is_not_known_to_be_exact():
    model, asked = make_reward("llama", spread=0.3), requests()
    model.config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
    }  # after it was built: for the guard
    assert not prefix_forward.can_share(model.model)
    found = torch.tensor(reward_logits.logits(model, asked, 400))
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
    found = torch.tensor(reward_logits.logits(model, asked, 400))
    assert (found - one_by_one(model, asked)).abs().max() < 1e-5


def test_out_of_memory_halves_the_budget(monkeypatch):
    model, asked = make_reward("qwen3"), requests()
    scorer, logits = HFScorer(model, make_tokenizer(), 1000), reward_logits.logits

    def short_of_memory(model, asked, budget, share):
        if budget > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits(model, asked, budget, share)

    monkeypatch.setattr(reward_logits, "logits", short_of_memory)
    assert (torch.tensor(scorer.score(asked)) - one_by_one(model, asked)).abs().max() < 1e-5
    assert scorer.token_budget == 250


def test_a_row_that_does_not_fit_by_itself_is_one_sentence(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. 1.00 GiB is free")

    scorer = HFScorer(make_reward("qwen3"), make_tokenizer(), 1000)
    monkeypatch.setattr(reward_logits, "logits", full)
    with pytest.raises(
        UserError, match=r"a single row does not fit in memory \(CUDA .* free\): expected no other"
    ):
        scorer.score(requests())


def test_a_window_that_ends_within_a_sequence_is_left_to_transformers_and_others_still_share():
    model = make_policy("cohere2", layers=4, spread=0.3, sliding_window=24).model.double()
    groups = [prefix_forward.Group(request.prompt_ids, request.completions) for request in requests()]
    slides = [prefix_forward._slides(model, group) for group in groups]
    assert True in slides
    assert False in slides
    places = [[len(rest) - 1 for rest in group.rests] for group in groups]
    with torch.inference_mode():
        for rows, output in prefix_forward.forward(model, groups, 400, read_at=places):
            for line, (g, i) in enumerate(rows):
                whole = model(torch.tensor([groups[g].prefix + groups[g].rests[i]])).last_hidden_state[0, -1]
                assert (
                    output.last_hidden_state[line, places[g][i]] - whole
                ).abs().max() < 1e-6  # norms are float32


def test_a_model_that_computes_something_else_is_scored_whole_and_says_so(caplog):
    model, asked = make_reward("qwen3", spread=0.3), requests()
    last = model.model.layers[-1]

    class Scaled(torch.nn.Module):  # an MLP that knows a token's place in its row
        def forward(self, hidden):
            return last.own(hidden) * (1 + torch.arange(hidden.shape[1]))[:, None]

    last.own, last.mlp = last.mlp, Scaled()
    scorer = HFScorer(model, make_tokenizer())
    assert "scores without sharing prompts" in caplog.text
    assert "differs by" in str(scorer.facts["reason"])
    assert (torch.tensor(scorer.score(asked)) - one_by_one(model, asked)).abs().max() < 1e-4


@pytest.fixture
def _varlen_on_a_cpu(monkeypatch):
    """As on a GPU in half precision, with the obvious twin of flash attention's kernel."""
    monkeypatch.setattr("croco.models.attention.rows.varlen_attn", varlen_twin)
    monkeypatch.setattr(proofs, "no_varlen", lambda device, dtype: None)


@pytest.mark.usefixtures("_varlen_on_a_cpu")
def test_what_the_kernel_refuses_is_said(monkeypatch, caplog):
    def refuses(*tensors, **options):
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")

    monkeypatch.setattr("croco.models.attention.rows.varlen_attn", refuses)
    scorer = HFScorer(make_reward("qwen3", layers=3), make_tokenizer())
    assert scorer.facts["scorer"] == "shared-prefix"
    assert "scores not in packed rows, which is slower" in caplog.text
    assert "head dimension at most 256" in caplog.text


@pytest.mark.usefixtures("_varlen_on_a_cpu")
@pytest.mark.parametrize("token_budget", [50, 400, 10_000])
@pytest.mark.parametrize("declared", [True, False])
def test_packed_rows_equal_one_by_one(token_budget, declared):
    model, asked = make_reward("qwen3", layers=3), requests(prompt_in_completions=not declared)
    scorer = HFScorer(model, make_tokenizer(), token_budget)
    assert scorer.facts["scorer"] == "packed rows"
    assert (torch.tensor(scorer.score(asked)) - one_by_one(model, asked)).abs().max() < 1e-5


@pytest.mark.usefixtures("_varlen_on_a_cpu")
@pytest.mark.parametrize("arch", ["llama", "cohere2", "qwen3", "gemma3", "mistral"])
def test_log_probabilities_of_packed_rows_equal_those_of_whole_sequences(arch):
    """A window that ends within a sequence too."""
    model, asked = make_policy(arch, layers=4, spread=0.3), requests()
    packed, whole = (
        HFLikelihood(model, make_tokenizer(), 200),
        HFLikelihood(model, make_tokenizer(), 200),
    )
    assert packed.way == "packed"
    whole.way = "whole"
    assert (torch.tensor(packed.score(asked)) - torch.tensor(whole.score(asked))).abs().max() < 1e-5


@pytest.mark.usefixtures("_varlen_on_a_cpu")
def test_where_packed_rows_fail_a_trial_prefixes_are_stored(monkeypatch):
    def refuses(*_args, **_options):
        raise RuntimeError("head dimension 8 is not supported")

    monkeypatch.setattr("croco.models.attention.rows.varlen_attn", refuses)
    model, asked = make_reward("qwen3"), requests()
    scorer = HFScorer(model, make_tokenizer())
    assert scorer.facts["scorer"] == "shared-prefix"
    assert "head dimension" in scorer.facts["reason"]
    assert (torch.tensor(scorer.score(asked)) - one_by_one(model, asked)).abs().max() < 1e-5
