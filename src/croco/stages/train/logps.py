"""Log-probabilities of completions from the hidden states, or the logits, that predict their tokens.

Only the M positions that predict a completion token meet the vocabulary, and in `head_logps` a few at a time: no (B, T,
V) or (M, V) tensor exists.

Shapes: M completion tokens of a batch, V vocabulary, D width, S sequences (completions) of a batch."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits held at a time: on a CPU what stays in its caches, on a GPU what fills it.
_LOGITS = {"cpu": 2**20, "cuda": 2**26}
_LEAST_ROWS = 32


def token_logps(logits_MV: Tensor, target_M: Tensor) -> Tensor:
    """Log-probability of each target token under its row of logits, (M,), in (-inf, 0]; in float32, because in bfloat16
    the sum over V loses the tail."""
    return -F.cross_entropy(logits_MV.float(), target_M, reduction="none")


def sequence_sums(values_M: Tensor, sequence_M: Tensor, num_sequences: int) -> Tensor:
    """Sums of the values of each sequence, (S,); `sequence_M` is the sequence, 0 to S - 1, of each token. One without
    tokens has 0."""
    return values_M.new_zeros(num_sequences).index_add(0, sequence_M, values_M)


def head_logps(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_M: Tensor,
    *,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """`token_logps` of the logits cap * tanh(scale * (hidden weightᵀ + bias) / cap), (M,); without a cap no tanh.

    A few rows at a time. With a frozen head each row's gradient for its hidden state is computed at once and kept, (M,
    D); with a trained head the logits are computed again in the backward pass."""
    trained = weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
    if trained and torch.is_grad_enabled():

        def logps(hidden: Tensor, target: Tensor) -> Tensor:
            return token_logps(_logits(hidden, weight_VD, bias_V, scale, cap), target)

        parts = _parts(weight_VD, hidden_MD, target_M)
        return torch.cat([checkpoint(logps, *part, use_reentrant=False) for part in parts])
    logps_M: Tensor = _FrozenHead.apply(hidden_MD, weight_VD, bias_V, target_M, scale, cap)
    return logps_M


def _parts(weight_VD: Tensor, hidden_MD: Tensor, target_M: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(_LEAST_ROWS, _LOGITS.get(hidden_MD.device.type, 2**26) // weight_VD.shape[0])
    return zip(hidden_MD.split(rows), target_M.split(rows), strict=True)


def _logits(
    hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scale: float, cap: float | None
) -> Tensor:
    logits_MV = F.linear(hidden_MD, weight_VD, bias_V)
    if scale != 1.0:
        logits_MV = logits_MV.float() * scale
    return logits_MV if cap is None else (logits_MV.float() / cap).tanh() * cap


class _FrozenHead(torch.autograd.Function):
    """d logp / d hidden = scale * ((one-hot - softmax) * (1 - (logits / cap)²)) weight, known once the logits are."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_M: Tensor,
        scale: float,
        cap: float | None,
    ) -> Tensor:
        slopes_MD = torch.empty_like(hidden_MD) if ctx.needs_input_grad[0] else None
        logps, start = [], 0
        for hidden, target in _parts(weight_VD, hidden_MD, target_M):
            logits = _logits(hidden, weight_VD, bias_V, scale, cap)
            bend = None if cap is None or slopes_MD is None else 1 - (logits / cap).square()
            logps_MV = logits.log_softmax(1, dtype=torch.float32)
            del logits
            picked = logps_MV.gather(1, target[:, None])
            logps.append(picked[:, 0])
            if slopes_MD is not None:
                slope = logps_MV.exp_()  # its negative, which the backward pass turns round
                slope.scatter_add_(1, target[:, None], -torch.ones_like(picked))
                if bend is not None:
                    slope *= bend
                if scale != 1.0:
                    slope *= scale
                stop = start + len(target)
                slopes_MD[start:stop] = slope.to(weight_VD.dtype) @ weight_VD
                start = stop
        if slopes_MD is not None:
            ctx.save_for_backward(slopes_MD)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, gradient_M: Tensor) -> tuple[Tensor | None, ...]:
        (slopes_MD,) = ctx.saved_tensors
        return (-gradient_M[:, None].to(slopes_MD.dtype) * slopes_MD, None, None, None, None, None)
