"""Attention over shared rows without a mask of the whole row: the prompt among itself, then each completion over the
prompt and itself; in the last layer, of the prompt, its last position alone.

The same numbers as SDPA under `mask.py`, less work: a completion never meets another one, and no padding is
computed. On a CPU, whose kernel computes whatever a mask forbids, that is up to half of the attention. It is plugged
into transformers as an attention function of its own name. Left out: attention that adds to or caps its scores
(`support.py` says which models those are), and GPUs, where masks or FlexAttention (`packing.py`) serve.

Shapes: B rows, H query heads, T tokens, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

NAME = "croco_shared_rows"


@dataclass
class Segments:
    """Rows in groups of the same lengths (prompt, completions…), in their order, and the masks made for them so far.

    `last` is the number of a layer after which of a prompt its last position is read only, if any.
    """

    groups: list[tuple[int, tuple[int, ...]]]  # (rows, lengths)
    last: int | None = None
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Sequence[tuple[int, ...]], last: int | None = None) -> "Segments":
        return cls([(len(list(rows)), each) for each, rows in groupby(lengths)], last)

    def mask(self, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
        """What the last `queries` of so many positions may see: 0 or −inf, (queries, keys)."""
        place = (queries, keys, window if window is not None and window < keys else None)
        if place not in self.masks:
            query = torch.arange(keys - queries, keys, device=like.device)[:, None]
            key = torch.arange(keys, device=like.device)
            seen = key <= query
            if place[2] is not None:
                seen &= query - key < place[2]
            zeros = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
            self.masks[place] = zeros.masked_fill_(~seen, float("-inf"))
        return self.masks[place]


def attend(
    module: torch.nn.Module,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, key-value heads, T, D)
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of shared rows, (B, T, H, D) as transformers expects it; padding and what nobody reads get zeros."""
    outputs = []
    at_last = segments.last is not None and getattr(module, "layer_idx", None) == segments.last
    sizes = [rows for rows, _ in segments.groups]
    for (rows, lengths), q, k, v in zip(
        segments.groups, query.split(sizes), key.split(sizes), value.split(sizes), strict=True
    ):
        padding = query.shape[2] - sum(lengths)
        queries, keys, values = (x.split([*lengths, padding], dim=2) for x in (q, k, v))
        parts = []
        for number, own in enumerate(queries[:-1]):
            seen_keys, seen_values = keys[number], values[number]
            if number:
                seen_keys = torch.cat([keys[0], seen_keys], 2)
                seen_values = torch.cat([values[0], seen_values], 2)
            if at_last and not number:
                parts.append(torch.zeros_like(own[:, :, 1:]))
                own = own[:, :, -1:]
            num_queries, num_keys = own.shape[2], seen_keys.shape[2]
            causal = num_queries == num_keys and (sliding_window is None or sliding_window >= num_keys)
            mask = None if causal else segments.mask(num_queries, num_keys, sliding_window, own)
            parts.append(
                F.scaled_dot_product_attention(
                    own, seen_keys, seen_values, attn_mask=mask, is_causal=causal, dropout_p=dropout,
                    scale=scaling, enable_gqa=q.shape[1] != k.shape[1],
                )
            )  # fmt: skip
        if padding:
            parts.append(q.new_zeros(rows, q.shape[1], padding, v.shape[3]))
        outputs.append(torch.cat(parts, 2))
    return torch.cat(outputs).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
