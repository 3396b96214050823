"""torch's attention of variable lengths the obvious way, one sequence at a time: for machines without a GPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_twin(
    query: Tensor,  # (queries, H, D)
    key: Tensor,  # (keys, key-value heads, D)
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Any:
    """Queries are the last places of their sequence's keys, and see `window_size` places before and after their own."""
    assert query.is_contiguous()
    assert query.dtype == key.dtype == value.dtype
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (cu_seq_q.diff().max(), cu_seq_k.diff().max()) == (max_q, max_k)
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key))
    before, after = window_size
    outputs = []
    for q, k, v in zip(
        *(
            x.split(ends.diff().tolist())
            for x, ends in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))
        ),
        strict=True,
    ):
        distance = torch.arange(len(k))[None] - torch.arange(len(k) - len(q), len(k))[:, None]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if after >= 0:
            seen &= distance <= after
        if before >= 0:
            seen &= distance >= -before
        rows = (x.transpose(0, 1)[None] for x in (q, k, v))
        output = F.scaled_dot_product_attention(*rows, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)
