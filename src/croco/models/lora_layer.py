"""A linear layer with a low-rank adapter as one operation: x Wᵀ + scale · dropout(x) Aᵀ Bᵀ, with W frozen.

Autograd keeps the input, which the layers beside it share, and how to drop the same again, instead of a copy after
dropout. The adapter is kept in float32 and computes, on a GPU, in the type of the layer's input; there dropout is
torch's own. On a CPU it computes in float32, and dropout draws a Poisson number of uniform places: "hit at all" is then
a Bernoulli variable, exactly, with a twentieth of a mask's random numbers at the usual 5 %. Left out: adapters with a
bias, and a W that is trained.

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


def _generator(device: torch.device) -> torch.Generator:
    """What torch's own dropout draws from there."""
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def _masked(values: Tensor, share: float, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """torch's dropout of the values, its mask of what is kept, and the generator's state before it: the mask is drawn
    anew from that in the backward pass, since masks of all layers would be a fifth of what is kept."""
    generator = _generator(values.device)
    now = generator.get_state()
    if state is not None:
        generator.set_state(state)
    dropped, kept = torch.native_dropout(values, share, True)
    if state is not None:
        generator.set_state(now)
    return dropped, kept, now


def _without(values: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the values in another type, zero at flat places."""
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
        share: float,
        gpu: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        output_NO = F.linear(input_NI, weight_OI, bias_O)
        values_NI, drawn = input_NI.to(dtype), None
        if share and gpu:
            values_NI, _, drawn = _masked(values_NI, share, None)
        elif share:
            drawn = dropped_places(input_NI.numel(), share, input_NI.device)
            values_NI = _without(input_NI, drawn, dtype)
        low_NR = values_NI @ a_RI.to(dtype).T
        ctx.save_for_backward(input_NI, weight_OI, a_RI, b_OR, low_NR, drawn)
        ctx.scale, ctx.share, ctx.gpu, ctx.dtype = scale, share, gpu, dtype
        return output_NO.to(dtype).addmm_(low_NR, b_OR.to(dtype).T, alpha=scale).to(input_NI.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_NO: Tensor) -> tuple[Tensor | None, ...]:
        input_NI, weight_OI, a_RI, b_OR, low_NR, drawn = ctx.saved_tensors
        own_NO = gradient_NO.to(ctx.dtype)
        low_gradient_NR = (own_NO @ b_OR.to(ctx.dtype)).mul_(ctx.scale)
        b_gradient = (own_NO.T @ low_NR).to(b_OR.dtype).mul_(ctx.scale)
        values_NI, kept = input_NI.to(ctx.dtype), None
        if drawn is not None and ctx.gpu:
            values_NI, kept, _ = _masked(values_NI, ctx.share, drawn)
        elif drawn is not None:
            values_NI = _without(input_NI, drawn, ctx.dtype)
        a_gradient = (low_gradient_NR.T @ values_NI).to(a_RI.dtype)
        input_gradient = None
        if ctx.needs_input_grad[0]:
            low_NI = low_gradient_NR @ a_RI.to(ctx.dtype)
            if kept is not None:
                low_NI = torch.ops.aten.native_dropout_backward(low_NI, kept, 1 / (1 - ctx.share))
            elif drawn is not None:
                low_NI.view(-1).index_fill_(0, drawn, 0.0)
            if gradient_NO.dtype == ctx.dtype:  # one product adds to the other in its own rounding
                input_gradient = low_NI.addmm_(gradient_NO, weight_OI)
            else:
                input_gradient = low_NI.add_(gradient_NO @ weight_OI).to(input_NI.dtype)
        return input_gradient, None, None, a_gradient, b_gradient, None, None, None, None
