"""Scores from the policy itself: log-probabilities of completions under the prompt that was sampled from ("likelihood"
is their mean over tokens, "likelihood-sum" their sum). `models/logprobs.py` computes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from croco.errors import Refused
from croco.models.chat_template import completions_ids, prompt_ids, with_instruction
from croco.models.protocols import ScoreRequest

if TYPE_CHECKING:
    from croco.config.models import Policy
    from croco.models.transformers import HFLikelihood
from croco.config.runtime import Runtime

Messages = list[dict[str, str]]
Completion = dict[str, Any]  # a row of the completions table
Groups = Sequence[tuple[Messages, list[Completion]]]  # a prompt's messages and its completions
# scores of one prompt's completions; in place of a score, the reason why there is none
Scored = list[float | str]


def open_likelihood(
    policy: Policy, runtime: Runtime, mean: bool, adapter: Path | None = None
) -> tuple[HFLikelihood, Any]:
    """The policy, with an adapter if given, as a scorer of log-probabilities, and its tokenizer."""
    from croco.models.loading import load_causal
    from croco.models.transformers import HFLikelihood

    model, tokenizer = load_causal(policy, runtime.device, adapter)
    return HFLikelihood(model, tokenizer, runtime.token_budget, name=policy.model, mean=mean), tokenizer


def score_likelihood(
    scorer: Any,
    tokenizer: Any,
    groups: Groups,
    instructions: Mapping[str, str],
) -> list[Scored]:
    """Log-probabilities under the prompts as they stand in `groups`; the end token counts where there was one."""
    requests, ended, places = [], [], []
    scored: list[Scored] = []
    for number, (messages, rows) in enumerate(groups):
        asked = with_instruction(messages, instructions.get(rows[0]["language"]))
        try:
            prompt = prompt_ids(tokenizer, asked)
        except Refused as error:
            scored.append([str(error)] * len(rows))
            continue
        known = [row["completion_ids"] for row in rows]
        if None in known:
            as_text = completions_ids(tokenizer, asked, [row["completion"] for row in rows])
            known = [ids if own is None else own for own, ids in zip(known, as_text, strict=True)]
        sampled: list[list[int]] = known
        lengths = [len(prompt) + len(ids) for ids in sampled]
        scored.append([too_long("prompt and completion", length, scorer.max_context) for length in lengths])
        stops = [row["finish_reason"] == "stop" for row in rows]
        fits = [i for i, length in enumerate(lengths) if length <= scorer.max_context]
        if fits:
            requests.append(ScoreRequest(number, prompt, [sampled[i] for i in fits]))
            ended.append([stops[i] for i in fits])
            places.append(fits)
    for request, fits, values in zip(requests, places, scorer.score(requests, ended), strict=True):
        for i, value in zip(fits, values, strict=True):
            scored[request.key][i] = value
    return scored


def too_long(what: str, length: int, limit: int) -> str:
    """The reason why a sequence has no score."""
    return f"the {what} has {length} tokens, the limit is {limit}"
