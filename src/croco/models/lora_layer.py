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
    dtype = input.dtype if gpu else a_RI.dtype
    scale = scale if gpu else scale / (1 - share)
    output_NO: Tensor = _LoraLinear.apply(input_NI, weight_OI, bias_O, a_RI, b_OR, scale, share, gpu, dtype)
    return output_NO.view(*input.shape[:-1], -1)


def _first_drop(values: Tensor, share: float, gpu: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The values in another type after dropout, and what was drawn: a mask of what is kept, or flat places. With a mask
    the others are grown for it, with places that is left to the layer's scale."""
    if not share:
        return values.to(dtype), None
    if gpu:
        kept: tuple[Tensor, Tensor] = torch.native_dropout(values.to(dtype), share, True)
        return kept
    places = dropped_places(values.numel(), share, values.device)
    return _drop(values, places, share, dtype), places


def _drop(values: Tensor, drawn: Tensor | None, share: float, dtype: torch.dtype) -> Tensor:
    """The values in another type after the same dropout once more."""
    if drawn is None:
        return values.to(dtype)
    if drawn.dtype == torch.bool:
        again: Tensor = torch.ops.aten.native_dropout_backward(values.to(dtype), drawn, 1 / (1 - share))
        return again
    return values.to(dtype, copy=True).view(-1).index_fill_(0, drawn, 0.0).view_as(values)


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
        share: float,
        gpu: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        output_NO = F.linear(input_NI, weight_OI, bias_O)
        values_NI, drawn = _first_drop(input_NI, share, gpu, dtype)
        low_NR = values_NI @ a_RI.to(dtype).T
        ctx.save_for_backward(input_NI, weight_OI, a_RI, b_OR, low_NR, drawn)
        ctx.scale, ctx.share, ctx.dtype = scale, share, dtype
        return output_NO.to(dtype).addmm_(low_NR, b_OR.to(dtype).T, alpha=scale).to(input_NI.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_NO: Tensor) -> tuple[Tensor | None, ...]:
        input_NI, weight_OI, a_RI, b_OR, low_NR, drawn = ctx.saved_tensors
        own_NO = gradient_NO.to(ctx.dtype)
        low_gradient_NR = (own_NO @ b_OR.to(ctx.dtype)).mul_(ctx.scale)
        b_gradient = (own_NO.T @ low_NR).to(b_OR.dtype).mul_(ctx.scale)
        a_gradient = (low_gradient_NR.T @ _drop(input_NI, drawn, ctx.share, ctx.dtype)).to(a_RI.dtype)
        input_gradient = None
        if ctx.needs_input_grad[0]:
            low_NI = low_gradient_NR @ a_RI.to(ctx.dtype)
            if drawn is not None:
                low_NI = _drop(low_NI, drawn, ctx.share, ctx.dtype)
            if gradient_NO.dtype == ctx.dtype:  # one product adds to the other in its own rounding
                input_gradient = low_NI.addmm_(gradient_NO, weight_OI)
            else:
                input_gradient = low_NI.add_(gradient_NO @ weight_OI).to(input_NI.dtype)
        return input_gradient, None, None, a_gradient, b_gradient, None, None, None, None
