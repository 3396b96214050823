"""The policy's own log-probability of a completion: the control that a reward model has to beat.

Computed on the ids that were sampled, the end token included where the completion ended by itself.

Shapes: M completion tokens of a batch, X the width of hidden states or the vocabulary."""

from collections.abc import Sequence
from typing import Any

import torch

from croco.models.chat_template import end_id
from croco.models.output_layer import bounded, read_out
from croco.models.prefix_forward import Group, Way, forward
from croco.models.protocols import ScoreRequest


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
    with read_out(model) as token_logps:
        for rows, output in forward(model, groups, bounded(token_budget, model), way):
            lengths = [len(targets[k][i]) for k, i in rows]
            wanted = [token for k, i in rows for token in targets[k][i]]
            states_MX = torch.cat([output.logits[line, :length] for line, length in enumerate(lengths)])
            wanted_M = torch.tensor(wanted, dtype=torch.long, device=model.device)
            logps_M = token_logps(states_MX, wanted_M).double()
            sums = torch.stack([part.sum() for part in logps_M.split(lengths)]).tolist()
            for (k, i), value in zip(rows, sums, strict=True):
                logps[k][i] = value
    return logps
