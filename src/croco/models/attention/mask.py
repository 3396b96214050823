"""Who attends to whom when one row holds a prompt and several completions of it.

A row is [prompt | completion 1 | completion 2 | padding]. Every completion attends to the prompt and to itself, and
positions restart after the prompt, so it sees what it would see in a row of its own. The mask is explicit because
transformers reads restarting positions without a mask as packed sequences, which cuts completions off from their
prompt.

Shapes: B rows, T tokens. `branch_BT` is 0 in the prompt, 1, 2, … in the completions and -1 in padding; `pair_BT` is the
pair that a token belongs to, -1 in padding."""

import torch
from torch import Tensor

PADDING = -1
PROMPT = 0


def prefix_mask(
    branch_BT: Tensor, position_BT: Tensor, window: int | None = None, pair_BT: Tensor | None = None
) -> Tensor:
    """Boolean mask (B, 1, T, T), true where the query (third axis) attends to the key (last axis).

    With a sliding `window` a query sees the `window` latest positions of its own sequence, itself included. Padding
    attends to itself only: an empty row of the softmax is NaN, which reaches every gradient."""
    num_tokens = branch_BT.shape[1]
    query_branch, key_branch = branch_BT[:, :, None], branch_BT[:, None, :]
    order = torch.arange(num_tokens, device=branch_BT.device)
    allowed = (key_branch == PROMPT) | (key_branch == query_branch)
    allowed &= (key_branch != PADDING) & (order[None, None, :] <= order[None, :, None])
    if pair_BT is not None:
        allowed &= pair_BT[:, :, None] == pair_BT[:, None, :]
    if window is not None:
        allowed &= position_BT[:, :, None] - position_BT[:, None, :] < window
    allowed |= torch.eye(num_tokens, dtype=torch.bool, device=branch_BT.device)
    return allowed[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers to add to attention scores, 0 where allowed and the type's minimum elsewhere (eager
    attention)."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
