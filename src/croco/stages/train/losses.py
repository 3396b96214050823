"""Preference losses as pure functions of log-probabilities (sums over a completion's tokens): one number per pair.

Shapes: P pairs. A *reward* is DPO's implicit one, beta * (policy_logp - reference_logp); a *margin* is the chosen's
reward minus the rejected's."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from croco.config.training import Training


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities (P,) under the policy and the reference, each in (-inf, 0], and token counts (P,)."""

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
    """DPO: -log sigmoid(beta * (chosen log-ratio - rejected log-ratio)), (P,), in (0, inf); log 2 at the reference.
    Rafailov et al. 2023 (arXiv 2305.18290), equation 7."""
    return -F.logsigmoid(beta * (pairs.chosen_logratios - pairs.rejected_logratios))


def ipo(pairs: PairLogps, beta: float) -> Tensor:
    """IPO: (mean chosen log-ratio - mean rejected log-ratio - 1 / (2 beta))², (P,), in [0, inf); beta is the paper's
    tau. Azar et al. 2023 (arXiv 2310.12036), equation 17, on means over tokens: on sums the square grows with length
    (the form its authors confirmed, and TRL's)."""
    chosen = pairs.chosen_logratios / pairs.chosen_tokens
    rejected = pairs.rejected_logratios / pairs.rejected_tokens
    return (chosen - rejected - 1 / (2 * beta)).square()


def hinge(pairs: PairLogps, beta: float) -> Tensor:
    """Hinge: max(0, 1 - beta * (chosen log-ratio - rejected log-ratio)), (P,), in [0, inf); no gradient past a margin
    of 1. SLiC's loss (Zhao et al. 2023, arXiv 2305.10425) on log-ratios, the "hinge-norm" of RSO (Liu et al. 2023,
    arXiv 2309.06657)."""
    return F.relu(1 - beta * (pairs.chosen_logratios - pairs.rejected_logratios))


def robust(pairs: PairLogps, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO: ((1 - e) * DPO(pair) - e * DPO(pair with its sides exchanged)) / (1 - 2e), (P,), in (-inf, inf); e is
    `label_smoothing`, the share of wrong labels, in [0, 0.5). Its mean over such flips is the clean pair's loss.
    Chowdhury et al. 2024, *Provably Robust DPO* (arXiv 2403.00409), the unbiased loss of its section on robust DPO."""
    margins = beta * (pairs.chosen_logratios - pairs.rejected_logratios)
    clean, flipped = -F.logsigmoid(margins), -F.logsigmoid(-margins)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def apo_zero(pairs: PairLogps, beta: float) -> Tensor:
    """APO-zero: 1 - sigmoid(chosen reward) + sigmoid(rejected reward), (P,), in (0, 2), 1 at the reference: each side
    moves against the reference, not the other. D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 7."""
    return 1 - (beta * pairs.chosen_logratios).sigmoid() + (beta * pairs.rejected_logratios).sigmoid()


def simpo(pairs: PairLogps, beta: float, gamma: float) -> Tensor:
    """SimPO: -log sigmoid(beta * (mean chosen logp - mean rejected logp) - gamma), (P,), in (0, inf), without a
    reference; `gamma` is the margin aimed at. Meng et al. 2024 (arXiv 2405.14734), equation 6."""
    chosen = pairs.policy_chosen_logps / pairs.chosen_tokens
    rejected = pairs.policy_rejected_logps / pairs.rejected_tokens
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def sigmoid_norm(pairs: PairLogps, beta: float) -> Tensor:
    """`sigmoid` on log-ratios averaged over the completion's tokens, (P,), in (0, inf): beta is larger (5 in the
    paper). Length-normalised DPO of Lambert et al. 2024, *Tülu 3* (arXiv 2411.15124)."""
    chosen = pairs.chosen_logratios / pairs.chosen_tokens
    rejected = pairs.rejected_logratios / pairs.rejected_tokens
    return -F.logsigmoid(beta * (chosen - rejected))


def nll(policy_logps: Tensor, num_tokens: Tensor) -> Tensor:
    """Negative log-likelihood per token of each completion, (P,), in [0, inf): what RPO (Pang et al. 2024, arXiv
    2404.19733, equation 1) and ICR add to DPO, on the chosen completion."""
    return -policy_logps / num_tokens


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "apo_zero": apo_zero,
    "simpo": simpo,
    "sigmoid_norm": sigmoid_norm,
}
# Losses that never look at the reference: none is computed for them.
REFERENCE_FREE = frozenset({"simpo"})


def preference_losses(
    loss: str, pairs: PairLogps, *, beta: float, label_smoothing: float = 0.0, simpo_gamma: float = 0.0
) -> Tensor:
    """The loss named `loss` of every pair, (P,); `label_smoothing` is read by "robust", `simpo_gamma` by "simpo"."""
    extra = {"robust": (label_smoothing,), "simpo": (simpo_gamma,)}.get(loss, ())
    return LOSSES[loss](pairs, beta, *extra)


def pair_losses(
    settings: Training, policy_logps_CP: Tensor, reference_logps_CP: Tensor | None, tokens_CP: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of every pair, (P,), and what is watched of it, each (P,) and detached.

    Method "sft": the chosen's negative log-likelihood, summed over tokens (no reference). Method "dpo": the preference
    loss, plus `nll_weight` times the chosen's mean negative log-likelihood."""
    if reference_logps_CP is None:
        chosen_logps = policy_logps_CP[0].detach()
        return -policy_logps_CP[0], {"logps/chosen": chosen_logps, "nll": nll(chosen_logps, tokens_CP[0])}
    pairs = PairLogps(*policy_logps_CP, *reference_logps_CP, *tokens_CP)
    losses_P = preference_losses(
        settings.loss,
        pairs,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        simpo_gamma=settings.simpo_gamma,
    )
    if settings.nll_weight:
        losses_P = losses_P + settings.nll_weight * nll(pairs.policy_chosen_logps, pairs.chosen_tokens)
    chosen, rejected = pairs.chosen_logratios.detach(), pairs.rejected_logratios.detach()
    if settings.loss in REFERENCE_FREE:  # SimPO's reward is the mean log-probability, which its loss compares
        chosen, rejected = (
            logps.detach() / tokens
            for logps, tokens in (
                (pairs.policy_chosen_logps, pairs.chosen_tokens),
                (pairs.policy_rejected_logps, pairs.rejected_tokens),
            )
        )
    chosen, rejected = settings.beta * chosen, settings.beta * rejected
    watched = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": pairs.policy_chosen_logps.detach(),
        "logps/rejected": pairs.policy_rejected_logps.detach(),
    }
    return losses_P, watched | _from_the_reference(settings, pairs)


def _from_the_reference(settings: Training, pairs: PairLogps) -> dict[str, Tensor]:
    """Distances of the policy from the reference, per token (P,); without a reference the chosen's NLL."""
    if settings.loss in REFERENCE_FREE:
        return {"nll": nll(pairs.policy_chosen_logps, pairs.chosen_tokens).detach()}
    chosen, rejected = pairs.chosen_logratios.detach(), pairs.rejected_logratios.detach()
    return {
        "logratios/chosen": chosen / pairs.chosen_tokens,
        # KL(reference || policy), on completions that the reference drew
        "kl": -(chosen + rejected) / (pairs.chosen_tokens + pairs.rejected_tokens),
    }
