"""The policy's own log-probability of a completion: the control that a reward model has to beat.

Computed on the ids that were sampled, the end token included where the completion ended by itself.

Shapes: B rows, T tokens, V vocabulary."""

from collections.abc import Sequence
from typing import Any

import torch

from croco.models.chat_template import end_id
from croco.models.prefix_forward import Group, Way, forward
from croco.models.protocols import ScoreRequest

_LOGITS_AT_ONCE = 2**27  # elements: half a GiB in float32


@torch.inference_mode()
def completion_logps(
    model: Any,
    tokenizer: Any,
    requests: Sequence[ScoreRequest],
    ended: Sequence[Sequence[bool]] | None = None,
    token_budget: int = 16384,
    way: Way = "stored",
) -> list[list[float]]:
    """log p(completion | prompt) summed over its tokens, each completion closed by the end token unless `ended[k][i]`
    is False. Prompts must not be empty."""
    end = end_id(tokenizer, model.generation_config)
    targets = [
        [ids + [end] * (ended is None or ended[k][i]) for i, ids in enumerate(request.completions)]
        for k, request in enumerate(requests)
    ]
    # the prompt's last token predicts the first of the completion, so it goes with the rest
    groups = [
        Group(request.prompt_ids[:-1], [[request.prompt_ids[-1], *ids[:-1]] for ids in targets[k]])
        for k, request in enumerate(requests)
    ]
    logps = [[0.0] * len(request.completions) for request in requests]
    budget = min(token_budget, max(1, _LOGITS_AT_ONCE // model.config.get_text_config().vocab_size))
    for rows, output in forward(model, groups, budget, way):
        logits_BTV = output.logits
        longest = max(len(targets[k][i]) for k, i in rows)
        wanted_BT = torch.zeros(len(rows), longest, dtype=torch.long)
        real_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
        for line, (k, i) in enumerate(rows):
            wanted_BT[line, : len(targets[k][i])] = torch.tensor(targets[k][i])
            real_BT[line, : len(targets[k][i])] = True
        logps_BT = _picked(logits_BTV[:, :longest], wanted_BT.to(model.device))
        sums = logps_BT.masked_fill(~real_BT.to(model.device), 0.0).double().sum(-1).tolist()
        for (k, i), value in zip(rows, sums, strict=True):
            logps[k][i] = value
    return logps


def _picked(logits_BTV: torch.Tensor, wanted_BT: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the wanted tokens, float32, a row at a time: a float32 copy of all logits is large."""
    rows = [
        logits.float().gather(-1, wanted[:, None])[:, 0] - logits.float().logsumexp(-1)
        for logits, wanted in zip(logits_BTV, wanted_BT, strict=True)
    ]
    return torch.stack(rows)
