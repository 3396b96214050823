"""Dropout on a CPU from 16 random bits a number instead of a Bernoulli draw each.

torch draws every number of its mask one by one there, which for adapters (a mask per layer and input) is a seventh of a
training step. Four masks come out of one 64-bit draw here; the share that is dropped is rounded to 1/65,536, and what
is kept is scaled by that very share. Other devices have torch's own.
"""

import torch
from torch import Tensor, nn

_STEPS = 2**16


def dropout(values: Tensor, share: float) -> Tensor:
    """`values`, of which a share is zero and the rest is scaled up so that the mean stays; from torch's generator.

    `share` is in [0, 1), rounded to 1/65,536.
    """
    dropped = round(share * _STEPS)
    draws = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: values.numel()].view(values.shape)
    kept = (bits >= dropped - _STEPS // 2).to(values.dtype)
    return values * kept.mul_(_STEPS / (_STEPS - dropped))


class Dropout(nn.Dropout):
    """`nn.Dropout` that is quicker on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """The input, with a share of it dropped while training."""
        if not self.training or input.device.type != "cpu" or not 0 < self.p < 1:
            return super().forward(input)
        return dropout(input, self.p)
