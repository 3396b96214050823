"""Scores of a sequence classifier with one logit: the raw logit at the last token of the conversation.

"Last token" is what transformers' classifiers take: the rightmost one that is not the padding token. The head computes
in float32, as vLLM's does: of 64 scores in bfloat16, spread by 3 around 8, an eighth equals another (simulated).
Classifiers whose head is not `score` on the last hidden state are computed one by one."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from croco.models.prefix_forward import Group, Way, forward
from croco.models.protocols import ScoreRequest


@torch.inference_mode()
def logits(
    model: Any, requests: Sequence[ScoreRequest], token_budget: int, way: Way = "stored"
) -> list[list[float]]:
    """Raw logits, float32, in the order of the requests and their completions; `way` as in `prefix_forward`."""
    scores = [[0.0] * len(request.completions) for request in requests]
    network = getattr(model, model.base_model_prefix, None)
    if network is None or not isinstance(getattr(model, "score", None), torch.nn.Linear):
        return _one_by_one(model, requests, scores)
    head, bias = model.score.weight.float(), model.score.bias
    bias = bias if bias is None else bias.float()
    pad = model.config.get_text_config().pad_token_id
    groups, lasts = [], []
    for request in requests:
        whole = [request.prompt_ids + completion for completion in request.completions]
        last = [_last(ids, pad) for ids in whole]
        # what all share, but never the token where one of them is read
        shared = min(_common(whole), *last) if len(whole) > 1 else 0
        groups.append(Group(whole[0][:shared] if whole else [], [ids[shared:] for ids in whole]))
        lasts.append([at - shared for at in last])
    for rows, output in forward(network, groups, token_budget, way, lasts):
        at = torch.tensor([lasts[g][i] for g, i in rows], device=model.device)
        hidden = output.last_hidden_state[torch.arange(len(rows), device=model.device), at]
        for (g, i), score in zip(rows, F.linear(hidden.float(), head, bias)[:, 0].tolist(), strict=True):
            scores[g][i] = score
    return scores


def _last(ids: Sequence[int], pad: int | None) -> int:
    """The place a score is read at; 0 when all is padding, as in transformers."""
    return next((at for at in range(len(ids) - 1, -1, -1) if ids[at] != pad), 0)


def _common(sequences: Sequence[list[int]]) -> int:
    """The number of tokens with which all of the sequences begin: those of the first and the last in sorted order."""
    low, high = min(sequences), max(sequences)
    return next((at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))


def _one_by_one(model: Any, requests: Sequence[ScoreRequest], scores: list[list[float]]) -> list[list[float]]:
    for g, request in enumerate(requests):
        for i, completion in enumerate(request.completions):
            ids = torch.tensor([request.prompt_ids + completion], device=model.device)
            scores[g][i] = (
                model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0].float().item()
            )
    return scores
