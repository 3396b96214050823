"""Preference losses as pure functions of log-probabilities: one number per pair, averaged by whoever calls.

The log-probabilities are sums over the tokens of a completion, given its prompt. Left out: how they are
computed (`logps.py`), and weighting or averaging over pairs (`training/trainer.py`).

Shapes: P pairs. A *reward* is DPO's implicit one, beta * (policy_logp - reference_logp); a *margin* is the
chosen's reward minus the rejected's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities (P,) of P pairs under the policy and the reference, each in (-inf, 0], and token
    counts (P,).
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    reference_chosen_logps: Tensor
    reference_rejected_logps: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def chosen_logratios(self) -> Tensor:
        """log pi(chosen) - log pi_ref(chosen), (P,)."""
        return self.policy_chosen_logps - self.reference_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """log pi(rejected) - log pi_ref(rejected), (P,)."""
        return self.policy_rejected_logps - self.reference_rejected_logps


def sigmoid(pairs: PairLogps, beta: float) -> Tensor:
    """DPO: -log sigmoid(beta * (chosen log-ratio - rejected log-ratio)), (P,), in (0, inf); log 2 at the
    reference.

    Rafailov et al. 2023, *Direct Preference Optimization* (arXiv 2305.18290), equation 7.
    """
    return -F.logsigmoid(beta * (pairs.chosen_logratios - pairs.rejected_logratios))


def ipo(pairs: PairLogps, beta: float) -> Tensor:
    """IPO: (mean chosen log-ratio - mean rejected log-ratio - 1 / (2 beta))², (P,), in [0, inf); beta is the
    paper's tau.

    Azar et al. 2023 (arXiv 2310.12036), equation 17, on log-ratios averaged over the completion's tokens: on
    sums the square grows with length (the form its authors confirmed, and TRL's).
    """
    chosen = pairs.chosen_logratios / pairs.chosen_tokens
    rejected = pairs.rejected_logratios / pairs.rejected_tokens
    return (chosen - rejected - 1 / (2 * beta)).square()


def nll(policy_logps: Tensor, num_tokens: Tensor) -> Tensor:
    """Negative log-likelihood per token of each completion, (P,), in [0, inf).

    The term that RPO (Pang et al. 2024, arXiv 2404.19733, equation 1) and ICR add to DPO, on the chosen
    completion.
    """
    return -policy_logps / num_tokens


LOSSES: dict[str, Callable[[PairLogps, float], Tensor]] = {"sigmoid": sigmoid, "ipo": ipo}
