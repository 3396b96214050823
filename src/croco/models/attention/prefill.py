"""Attention of many rows over a prefix that they share, stored once, and over their own tokens.

The rows of one prefix look at it in one call; this and their own tokens are two softmaxes, joined by their log-sum-exps
into the one over both: ordinary attention without a mask or a copy of a prefix (Juravsky et al. 2024, arXiv
2402.05099). Leaves out what such a function cannot see (`support.unsupported`) and windows shorter than a sequence.

Shapes: B rows, T own tokens, P prefix tokens, H query heads, D head dimension."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from croco.models.attention.support import refuse_unknown

NAME = "croco_shared_suffix"
_BLOCK = 64  # queries


@dataclass(frozen=True)
class Prefix:
    """A prefix in the batch: the rows that follow it, and its keys and values per layer, of one row."""

    rows: slice
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """The prefixes of a batch, and the one token of each row (B,) that is read from the last layer, if only one is."""

    prefixes: list[Prefix]
    read_at_B: torch.Tensor | None
    last_layer: int


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # (B, H, T, D)
    key: torch.Tensor,  # (B, key-value heads, T, D)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    batch: Batch,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Exact causal attention over prefix and own tokens; returns (B, T, H, D), as transformers expects."""
    refuse_unknown(kwargs)
    layer: int = module.layer_idx  # type: ignore[assignment]
    rows, heads, tokens, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    key, value = _for_heads(key, heads), _for_heads(value, heads)
    if batch.read_at_B is not None and layer == batch.last_layer:
        query = query[torch.arange(rows, device=query.device), :, batch.read_at_B][:, :, None]
        own, own_lse = _attend_from(query, key, value, batch.read_at_B, scale)
    else:
        own, own_lse = _attend(query, key, value, True, scale)
    for prefix in batch.prefixes:
        asked = query[prefix.rows].transpose(1, 2).reshape(1, -1, heads, width).transpose(1, 2)
        stored = _for_heads(prefix.keys[layer], heads), _for_heads(prefix.values[layer], heads)
        seen, lse = _attend(asked, *stored, False, scale)
        lse = lse.view(heads, -1, query.shape[2]).transpose(0, 1)
        share = (lse - own_lse[prefix.rows]).sigmoid().to(own.dtype)[..., None]
        seen = seen.transpose(1, 2).reshape(-1, query.shape[2], heads, seen.shape[-1]).transpose(1, 2)
        own[prefix.rows].lerp_(seen, share)
    return own.transpose(1, 2).expand(-1, tokens, -1, -1), None


def _for_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values (B, key-value heads, T, D) repeated for their query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (B, H, T, D) and the log-sum-exp of its scores (B, H, T): torch's own kernels, which SDPA calls too."""
    if query.device.type == "cpu":
        on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        if not causal:
            return tuple(on_cpu(query, key, value, scale=scale))
        # the kernel computes whole squares of short rows: block by block it is a quarter quicker
        mask = query.new_full((query.shape[2], query.shape[2]), float("-inf")).triu_(1)
        blocks = [slice(start, start + _BLOCK) for start in range(0, query.shape[2], _BLOCK)]
        ends = [slice(min(block.stop, query.shape[2])) for block in blocks]
        parts = [
            on_cpu(query[:, :, b], key[:, :, e], value[:, :, e], attn_mask=mask[b, e], scale=scale)
            for b, e in zip(blocks, ends, strict=True)
        ]
        return torch.cat([seen for seen, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)
    seen, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, causal, scale=scale
    )
    return seen, lse[..., : query.shape[2]]  # padded to whole blocks


def _attend_from(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, at_B: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a single query per row, (B, H, 1, D) at token `at_B[b]`."""
    later_BT = torch.arange(key.shape[2], device=key.device) > at_B[:, None]
    scores = (query @ key.transpose(2, 3)).float() * scale
    scores = scores.masked_fill(later_BT[:, None, None], float("-inf"))
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse


AttentionInterface.register(NAME, attend)
