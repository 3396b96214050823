"""The losses against arithmetic done by hand."""

import math

import pytest
import torch

from croco.ops.logps import sequence_sums, token_logps
from croco.ops.losses import PairLogps, ipo, nll, sigmoid

# Chosen: policy -10, reference -12 over 4 tokens; rejected: policy -9, reference -8 over 2 tokens.
# Log-ratios are +2 and -1, so the difference is 3.
PAIR = PairLogps(
    *(torch.tensor([value], requires_grad=True) for value in (-10.0, -9.0, -12.0, -8.0, 4.0, 2.0))
)


def test_sigmoid_by_hand():
    # -log sigmoid(0.1 * 3) = log(1 + e^-0.3) = 0.554355
    assert sigmoid(PAIR, beta=0.1).item() == pytest.approx(math.log1p(math.exp(-0.3)), rel=1e-6)
    assert sigmoid(PAIR, beta=0.1).item() == pytest.approx(0.554355, abs=1e-6)


def test_sigmoid_is_log_2_at_the_reference():
    same = PairLogps(*(torch.tensor([value]) for value in (-5.0, -7.0, -5.0, -7.0, 3.0, 3.0)))
    assert sigmoid(same, beta=0.7).item() == pytest.approx(math.log(2), rel=1e-6)


def test_sigmoid_gradient_by_hand():
    # d loss / d policy_chosen_logp = -beta * sigmoid(-beta * 3)
    (gradient,) = torch.autograd.grad(sigmoid(PAIR, beta=0.1).sum(), PAIR.policy_chosen_logps)
    assert gradient.item() == pytest.approx(-0.1 / (1 + math.exp(0.3)), rel=1e-5)


def test_ipo_by_hand():
    # Means per token: 2 / 4 = 0.5 and -1 / 2 = -0.5; target 1 / (2 * 0.1) = 5; (1 - 5)² = 16.
    assert ipo(PAIR, beta=0.1).item() == pytest.approx(16.0, rel=1e-6)


def test_nll_is_the_mean_over_tokens():
    assert nll(PAIR.policy_chosen_logps, PAIR.chosen_tokens).item() == pytest.approx(2.5)


def test_token_logps_by_hand():
    # Odds 1 : 2 : 5 over three tokens, so the second has probability 2 / 8.
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log() + 3.0
    assert token_logps(logits, torch.tensor([1])).item() == pytest.approx(math.log(0.25), rel=1e-6)


def test_sequence_sums_keep_sequences_apart():
    sums = sequence_sums(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2, 0, 2, 0]), 4)
    assert sums.tolist() == [10.0, 0.0, 5.0, 0.0]
