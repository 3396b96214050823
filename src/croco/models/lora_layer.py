"""A linear layer with a low-rank adapter as one operation: x Wᵀ + scale · dropout(x) Aᵀ Bᵀ, with W frozen.

Layer by layer, autograd keeps of every adapter the input after dropout and its mask; here it keeps the input, which
the layers beside it share, and which places were dropped. The low-rank product is added in place, forward and backward.
Dropout is drawn by throwing: as many throws as a Poisson variable says, each at a place that is uniform. How often a
place is hit is then Poisson too, and independent of other places: "hit at all" is a Bernoulli variable, exactly. At the
usual 5 % that is a twentieth of the random numbers of a mask. Left out: adapters with a bias, and a W that is trained.

Shapes: N tokens, I inputs, O outputs, R rank, K throws.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def dropped_places(numel: int, share: float, device: torch.device | str = "cpu") -> Tensor:
    """Flat places of which each of `numel` is one with probability `share` in [0, 1), (K,), some of them twice."""
    rate = torch.tensor(-math.log1p(-share) * numel, dtype=torch.float64)
    return torch.randint(max(numel, 1), (int(torch.poisson(rate)),), device=device)


def lora_linear(
    input: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    scale: float,
    share: float,
) -> Tensor:
    """The layer's output for inputs (..., I): (..., O), in the input's type.

    A `share` of what the adapter sees is dropped. Adapters of another type than the input compute in their own.
    """
    input_NI = input.reshape(-1, input.shape[-1])
    places = dropped_places(input_NI.numel(), share, input.device) if share else None
    output_NO: Tensor = _LoraLinear.apply(
        input_NI, weight_OI, bias_O, a_RI, b_OR, scale / (1 - share), places
    )
    return output_NO.view(*input.shape[:-1], -1)


def _dropped(values: Tensor, places: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The values in another type, zero at the places; the very tensor where nothing changes."""
    if places is None:
        return values.to(dtype)
    return values.to(dtype, copy=True).view(-1).index_fill_(0, places, 0.0).view_as(values)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input_NI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
        places: Tensor | None,
    ) -> Tensor:
        output_NO = F.linear(input_NI, weight_OI, bias_O)
        low_NR = _dropped(input_NI, places, a_RI.dtype) @ a_RI.T
        ctx.save_for_backward(input_NI, weight_OI, a_RI, b_OR, low_NR, places)
        ctx.scale = scale
        whole = output_NO.to(a_RI.dtype).addmm_(low_NR, b_OR.T, alpha=scale)
        return whole.to(input_NI.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_NO: Tensor) -> tuple[Tensor | None, ...]:
        input_NI, weight_OI, a_RI, b_OR, low_NR, places = ctx.saved_tensors
        own_NO = gradient_NO.to(a_RI.dtype)
        low_gradient_NR = (own_NO @ b_OR).mul_(ctx.scale)
        b_gradient = (own_NO.T @ low_NR).mul_(ctx.scale)
        a_gradient = low_gradient_NR.T @ _dropped(input_NI, places, a_RI.dtype)
        input_gradient = None
        if ctx.needs_input_grad[0]:
            whole = (gradient_NO @ weight_OI).to(a_RI.dtype)
            if places is None:
                whole.addmm_(low_gradient_NR, a_RI)
            else:
                whole += (low_gradient_NR @ a_RI).view(-1).index_fill_(0, places, 0.0).view_as(whole)
            input_gradient = whole.to(input_NI.dtype)
        return input_gradient, None, None, a_gradient, b_gradient, None, None
