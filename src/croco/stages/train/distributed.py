"""Several processes that tune one policy: their ranks, what they exchange, and how a step's pairs are shared.

A step has the same pairs however many processes there are: they are dealt out by length, and gradients are summed. In a
single process everything here is the identity. `stages/train/launch.py` starts them."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel


def rank() -> int:
    """The number of this process, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Go on once every process is here."""
    if world() > 1:
        dist.barrier()


def gathered(value: Any) -> list[Any]:
    """What every process passed, by rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def name_own_layers(model: PreTrainedModel) -> None:
    """Leave in a model's list of layers that are not split those that it has: FSDP wraps them, unless its file names
    others, and accelerate stops at one that is not there (of Gemma 3's tower, for one)."""
    there = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = sorted(there & set(model._no_split_modules or ()))


def shares(pairs: Sequence[int], lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Pairs dealt out longest first, back and forth; a share may be empty when there are few."""
    if num_shares == 1:
        return [list(pairs)]
    dealt: list[list[int]] = [[] for _ in range(num_shares)]
    order = sorted(pairs, key=lambda i: (-lengths[i], i))
    for place, pair in enumerate(order):
        turn, seat = divmod(place, num_shares)
        dealt[seat if turn % 2 == 0 else num_shares - 1 - seat].append(pair)
    return dealt
