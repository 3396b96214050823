"""A linear layer with a low-rank adapter as one operation: x Wᵀ + scale · dropout(x) Aᵀ Bᵀ, with W frozen.

Autograd keeps the input, which the layers beside it share, and what was dropped, instead of a copy after dropout. The
adapter is kept in float32 and computes, on a GPU, in the type of the layer's input; there dropout is torch's own. On a
CPU it computes in float32, and dropout draws a Poisson number of uniform places: "hit at all" is then a Bernoulli
variable, exactly, with a twentieth of a mask's random numbers at the usual 5 %. Left out: adapters with a bias, and a W
that is trained.

Shapes: N tokens, I inputs, O outputs, R rank, K places."""

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
    on_gpu: bool | None = None,
) -> Tensor:
    """The layer's output for inputs (..., I): (..., O), in the input's type; a `share` of what the adapter sees is
    dropped. `on_gpu` is as the input's device says, unless a test says otherwise."""
    gpu = input.is_cuda if on_gpu is None else on_gpu
    input_NI = input.reshape(-1, input.shape[-1])
    dropped = None
    if share and gpu:
        kept = torch.empty(input_NI.shape, dtype=torch.bool, device=input.device)
        dropped = kept.bernoulli_(1 - share)
    elif share:
        dropped = dropped_places(input_NI.numel(), share, input.device)
    dtype = input.dtype if gpu else a_RI.dtype
    output_NO: Tensor = _LoraLinear.apply(
        input_NI, weight_OI, bias_O, a_RI, b_OR, scale / (1 - share), dropped, dtype
    )
    return output_NO.view(*input.shape[:-1], -1)


def _drop(values: Tensor, dropped: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The values in another type, zero where they are dropped (flat places, or false in a mask of what is kept)."""
    if dropped is None:
        return values.to(dtype)
    if dropped.dtype == torch.bool:
        return values.to(dtype) * dropped
    return values.to(dtype, copy=True).view(-1).index_fill_(0, dropped, 0.0).view_as(values)


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
        dropped: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        output_NO = F.linear(input_NI, weight_OI, bias_O)
        low_NR = _drop(input_NI, dropped, dtype) @ a_RI.to(dtype).T
        ctx.save_for_backward(input_NI, weight_OI, a_RI, b_OR, low_NR, dropped)
        ctx.scale, ctx.dtype = scale, dtype
        return output_NO.to(dtype).addmm_(low_NR, b_OR.to(dtype).T, alpha=scale).to(input_NI.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_NO: Tensor) -> tuple[Tensor | None, ...]:
        input_NI, weight_OI, a_RI, b_OR, low_NR, dropped = ctx.saved_tensors
        own_NO = gradient_NO.to(ctx.dtype)
        low_gradient_NR = (own_NO @ b_OR.to(ctx.dtype)).mul_(ctx.scale)
        b_gradient = (own_NO.T @ low_NR).to(b_OR.dtype).mul_(ctx.scale)
        a_gradient = (low_gradient_NR.T @ _drop(input_NI, dropped, ctx.dtype)).to(a_RI.dtype)
        input_gradient = None
        if ctx.needs_input_grad[0]:
            whole = (gradient_NO @ weight_OI).to(ctx.dtype)
            if dropped is None:
                whole.addmm_(low_gradient_NR, a_RI.to(ctx.dtype))
            else:
                whole += _drop(low_gradient_NR @ a_RI.to(ctx.dtype), dropped, ctx.dtype)
            input_gradient = whole.to(input_NI.dtype)
        return input_gradient, None, None, a_gradient, b_gradient, None, None, None
