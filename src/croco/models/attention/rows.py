"""Attention over shared rows without a mask: the prompt over itself, then each completion over the prompt and itself.

The same numbers as SDPA under `mask.py`, with less work. On a GPU all rows of a batch are one sequence for torch's
flash attention of variable lengths (`torch.nn.attention.varlen`); on a CPU, whose kernel computes what a mask forbids,
each segment is a call of its own. Left out: attention that adds to or caps its scores (`support.py`).

Shapes: B rows, H query heads, T tokens, D head dimension, K keys of all segments."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from croco.models.attention.support import refuse_unknown

NAME = "croco_shared_rows"
HALF = (torch.bfloat16, torch.float16)  # what flash attention computes in
CAUSAL = (-1, 0)  # varlen's window: every key up to the query's own place

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn: Callable[..., Any] | None = None  # type: ignore[no-redef]


@cache
def _grouped(function: Callable[..., Any]) -> dict[str, Any]:
    """What a torch's varlen wants to hear of fewer heads of keys than of queries: 2.11 takes them unasked."""
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(function).parameters else {}


def no_varlen(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash attention of variable lengths cannot be tried here, or None."""
    if device.type != "cuda":
        return "it needs a GPU"
    if varlen_attn is None:
        return f"torch {torch.__version__} has none, expected 2.10 or later"
    if dtype not in HALF:
        return (
            f"it computes in bfloat16 or float16, and the weights are in {str(dtype).removeprefix('torch.')}"
        )
    return None


@dataclass(frozen=True)
class PackedSegments:
    """Pairs one after the other in a single row, as the sequences of `varlen_attn`: queries in the order of the row,
    and for each sequence of queries the keys it sees, its own at the end."""

    key_K: Tensor  # places in the row
    query_ends: Tensor  # int32, from 0 on
    key_ends: Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, lengths: Sequence[tuple[int, ...]], device: torch.device) -> "PackedSegments":
        """`lengths` are those of every pair's prompt and completions; a completion may have none of its own."""
        queries, keys, places, start = [], [], [], 0
        for prompt, *completions in lengths:
            shared = torch.arange(start, start + prompt)
            queries.append(prompt)
            keys.append(prompt)
            places.append(shared)
            start += prompt
            for own in filter(None, completions):
                queries.append(own)
                keys.append(prompt + own)
                places += [shared, torch.arange(start, start + own)]
                start += own
        ends = [
            torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device) for each in (queries, keys)
        ]
        return cls(torch.cat(places).to(device), ends[0], ends[1], max(queries), max(keys))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """(1, T, H, D) of (1, heads, T, D) each; a window counts the query's own place, varlen's does not."""
        assert varlen_attn is not None
        # under autocast rotary positions leave queries and keys in float32, which SDPA is spared and varlen is not
        queries, keys, values = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
        output: Any = varlen_attn(
            queries.contiguous(),
            keys.index_select(0, self.key_K),
            values.index_select(0, self.key_K),
            self.query_ends, self.key_ends, self.most_queries, self.most_keys,
            scale=scaling,
            window_size=CAUSAL if window is None or window >= self.most_keys else (window - 1, 0),
            **(_grouped(varlen_attn) if query.shape[1] != key.shape[1] else {}),
        )  # fmt: skip
        return cast(Tensor, output)[None]


@dataclass
class Segments:
    """Rows in groups of the same lengths (prompt, completions…), in their order, and the masks made for them so far.
    `last` is the layer after which only the last position of a prompt is read, if any."""

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
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        at_last: bool,
    ) -> Tensor:
        """(B, T, H, D) of (B, heads, T, D) each; padding and what is not read get zeros."""
        outputs = []
        sizes = [rows for rows, _ in self.groups]
        for (rows, lengths), q, k, v in zip(
            self.groups, query.split(sizes), key.split(sizes), value.split(sizes), strict=True
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
                causal = num_queries == num_keys and (window is None or window >= num_keys)
                parts.append(
                    F.scaled_dot_product_attention(
                        own, seen_keys, seen_values, is_causal=causal, scale=scaling,
                        attn_mask=None if causal else self.mask(num_queries, num_keys, window, own),
                        enable_gqa=q.shape[1] != k.shape[1],
                    )
                )  # fmt: skip
            if padding:
                parts.append(q.new_zeros(rows, q.shape[1], padding, v.shape[3]))
            outputs.append(torch.cat(parts, 2))
        return torch.cat(outputs).transpose(1, 2)


def attend(
    module: torch.nn.Module,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, key-value heads, T, D)
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | PackedSegments,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of shared rows, (B, T, H, D) as transformers expects it, without a model's own dropout."""
    refuse_unknown(options)
    if isinstance(segments, PackedSegments):
        return segments.attend(query, key, value, scaling, sliding_window), None
    at_last = segments.last is not None and getattr(module, "layer_idx", None) == segments.last
    return segments.attend(query, key, value, scaling, sliding_window, at_last), None


AttentionInterface.register(NAME, attend)
