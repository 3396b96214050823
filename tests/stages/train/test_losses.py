"""The losses against arithmetic done by hand."""

import math

import pytest
import torch

from croco.models.output_layer import token_logps
from croco.stages.train.forward import sequence_sums
from croco.stages.train.losses import (
    LOSSES,
    REFERENCE_FREE,
    PairLogps,
    apo_zero,
    hinge,
    ipo,
    nll,
    preference_losses,
    robust,
    sigmoid,
    sigmoid_norm,
    simpo,
)

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


def test_hinge_by_hand():
    # 1 - 0.1 * 3 = 0.7; at beta 0.4 the margin is 1.2, past 1: no loss and no gradient.
    assert hinge(PAIR, beta=0.1).item() == pytest.approx(0.7, rel=1e-6)
    loss = hinge(PAIR, beta=0.4)
    assert loss.item() == 0.0
    (gradient,) = torch.autograd.grad(loss.sum(), PAIR.policy_chosen_logps)
    assert gradient.item() == 0.0


def test_robust_by_hand():
    # (0.9 * log(1 + e^-0.3) - 0.1 * log(1 + e^0.3)) / 0.8 = (0.9 * 0.554355 - 0.1 * 0.854355) / 0.8
    assert robust(PAIR, beta=0.1, label_smoothing=0.1).item() == pytest.approx(0.516855, abs=1e-6)
    assert robust(PAIR, 0.1, 0.0).item() == sigmoid(PAIR, 0.1).item()


def test_robust_is_unbiased_under_flipped_labels():
    flipped = PairLogps(
        PAIR.policy_rejected_logps, PAIR.policy_chosen_logps, PAIR.reference_rejected_logps,
        PAIR.reference_chosen_logps, PAIR.rejected_tokens, PAIR.chosen_tokens,
    )  # fmt: skip
    mean = 0.8 * robust(PAIR, 0.1, 0.2) + 0.2 * robust(flipped, 0.1, 0.2)
    assert mean.item() == pytest.approx(sigmoid(PAIR, 0.1).item(), rel=1e-5)


def test_apo_zero_by_hand():
    # 1 - sigmoid(0.2) + sigmoid(-0.1) = 1 - 0.549834 + 0.475021
    assert apo_zero(PAIR, beta=0.1).item() == pytest.approx(0.925187, abs=1e-6)
    chosen, rejected = torch.autograd.grad(
        apo_zero(PAIR, 0.1).sum(), (PAIR.policy_chosen_logps, PAIR.policy_rejected_logps)
    )
    assert chosen.item() == pytest.approx(-0.1 * 0.549834 * 0.450166, rel=1e-5)
    assert rejected.item() == pytest.approx(0.1 * 0.475021 * 0.524979, rel=1e-5)


def test_simpo_by_hand():
    # Means per token -2.5 and -4.5: 2 * 2 - 1 = 3, log(1 + e^-3) = 0.048587
    assert simpo(PAIR, beta=2.0, gamma=1.0).item() == pytest.approx(0.048587, abs=1e-6)


def test_sigmoid_norm_by_hand():
    # Means per token 0.5 and -0.5: 5 * 1, log(1 + e^-5) = 0.006715
    assert sigmoid_norm(PAIR, beta=5.0).item() == pytest.approx(0.006715, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_only_reference_free_losses_ignore_the_reference(loss):
    nowhere = torch.zeros(1)
    other = PairLogps(
        PAIR.policy_chosen_logps, PAIR.policy_rejected_logps, nowhere, nowhere, PAIR.chosen_tokens, PAIR.rejected_tokens
    )  # fmt: skip
    found, expected = (preference_losses(loss, pairs, beta=0.1, simpo_gamma=0.5) for pairs in (PAIR, other))
    assert found.equal(expected) == (loss in REFERENCE_FREE)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_falls_as_the_chosen_rises_and_the_rejected_falls(loss):
    chosen, rejected = torch.autograd.grad(
        preference_losses(loss, PAIR, beta=0.1, label_smoothing=0.1).sum(),
        (PAIR.policy_chosen_logps, PAIR.policy_rejected_logps),
    )
    assert chosen.item() < 0 < rejected.item()


def test_a_loss_reads_its_own_settings_only():
    settings = {"label_smoothing": 0.1, "simpo_gamma": 1.0}
    assert preference_losses("robust", PAIR, beta=0.1, **settings).equal(robust(PAIR, 0.1, 0.1))
    assert preference_losses("simpo", PAIR, beta=2.0, **settings).equal(simpo(PAIR, 2.0, 1.0))
    assert preference_losses("sigmoid", PAIR, beta=0.1, **settings).equal(sigmoid(PAIR, 0.1))


def test_nll_is_the_mean_over_tokens():
    assert nll(PAIR.policy_chosen_logps, PAIR.chosen_tokens).item() == pytest.approx(2.5)


def test_token_logps_by_hand():
    # Odds 1 : 2 : 5 over three tokens, so the second has probability 2 / 8.
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log() + 3.0
    assert token_logps(logits, torch.tensor([1])).item() == pytest.approx(math.log(0.25), rel=1e-6)


def test_sequence_sums_keep_sequences_apart():
    sums = sequence_sums(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2, 0, 2, 0]), 4)
    assert sums.tolist() == [10.0, 0.0, 5.0, 0.0]
