"""Log-probabilities of completions from the logits that predict their tokens.

Only the M positions that predict a completion token ever meet the vocabulary: callers gather hidden states
first (see `training/forward.py`), so that no (B, T, V) tensor exists. What is left out: masks and models;
these functions see logits.

Shapes: M completion tokens of a batch, V vocabulary, S sequences (completions) of a batch.
"""

import torch.nn.functional as F
from torch import Tensor


def token_logps(logits_MV: Tensor, target_M: Tensor) -> Tensor:
    """Log-probability of each target token under its row of logits, (M,) float32, in (-inf, 0].

    The softmax is taken in float32 whatever the logits' type: in bfloat16 the sum over V loses the tail.
    """
    return -F.cross_entropy(logits_MV.float(), target_M, reduction="none")


def sequence_sums(values_M: Tensor, sequence_M: Tensor, num_sequences: int) -> Tensor:
    """Sum of the values of each sequence, (S,): with token log-probabilities, log p(completion | prompt).

    `sequence_M` says which sequence, 0 to S - 1, each token belongs to; a sequence without tokens sums to 0.
    """
    return values_M.new_zeros(num_sequences).index_add(0, sequence_M, values_M)
