"""The last layer, finished only at the tokens that are read.

Hooks give its queries, output projection and MLP the places that are read and put what they return back there;
elsewhere what the model returns is arbitrary. Left out: experts, whose routing counts every token.

Shapes: B rows, T tokens, D width, N places."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MOST = 0.9  # share of places above which there is nothing to spare


@contextmanager
def finished_at(model: Any, place_N: Tensor, num_tokens: int) -> Iterator[None]:
    """Within it, the last layer of a decoder is finished at some columns of the flattened (B * T) grid only, each named
    once."""
    parts = _parts(model) if len(place_N) <= MOST * num_tokens else []
    handles = []
    for part in parts:
        shapes: list[torch.Size] = []

        def gather(
            _: nn.Module, args: tuple[Tensor, ...], shapes: list[torch.Size] = shapes
        ) -> tuple[Tensor, ...]:
            shapes.append(args[0].shape)
            return (args[0].reshape(-1, args[0].shape[-1]).index_select(0, place_N)[None], *args[1:])

        def scatter(_: nn.Module, args: Any, output: Tensor, shapes: list[torch.Size] = shapes) -> Tensor:
            rows, columns, _width = shapes.pop()
            whole = output.new_zeros(rows * columns, output.shape[-1]).index_copy(0, place_N, output[0])
            return whole.view(rows, columns, -1)

        handles += [part.register_forward_pre_hook(gather), part.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(model: Any) -> list[nn.Module]:
    layers = getattr(model.base_model, "layers", None)
    layer = layers[-1] if layers else None
    attention = getattr(layer, "self_attn", None)
    output, mlp = getattr(attention, "o_proj", None), getattr(layer, "mlp", None)
    if not isinstance(output, nn.Module) or not isinstance(mlp, nn.Module):
        return []
    queries = getattr(attention, "q_proj", None)  # some have one projection for queries, keys and values
    return [part for part in (queries, output, mlp) if isinstance(part, nn.Module)]
