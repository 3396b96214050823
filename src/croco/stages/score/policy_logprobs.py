"""Scores from the policy itself: log-probabilities of completions under the prompt that was sampled from.

"likelihood" is their mean over tokens, "likelihood-sum" their sum; `models/logprobs.py` computes them. "implicit" is
the implicit reward of a DPO arm, read across languages (ICR, arXiv 2503.04647): a policy tuned by DPO on English judges
other languages too, when it is asked in English. The score of y is log p_dpo(y | x) - log p_reference(y | x), summed
over y's tokens, where x is the English prompt with an instruction to answer in y's language. Length is taken out when
pairs are chosen (`calibration = "length"`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from croco import languages
from croco.config.arms import ENGLISH
from croco.config.models import Policy
from croco.config.runtime import Runtime
from croco.errors import Refused, UserError
from croco.models.chat_template import completions_ids, prompt_ids, with_instruction
from croco.models.open import with_tuned
from croco.models.protocols import ScoreRequest

if TYPE_CHECKING:
    from croco.models.transformers import HFLikelihood

NO_ENGLISH = "the prompt has no English version"
NO_TOKENS = "the completion has no tokens and no end"
Messages = list[dict[str, str]]
Completion = dict[str, Any]  # a row of the completions table
Groups = Sequence[tuple[Messages, list[Completion]]]  # a prompt's messages and its completions
# scores of one prompt's completions; in place of a score, the reason why there is none
Scored = list[float | str]


def messages_of(prompts: pl.DataFrame) -> dict[tuple[str, str], Messages]:
    """The turns of every prompt, by prompt_id and language."""
    return {tuple(row[:2]): row[2] for row in prompts.select("prompt_id", "language", "messages").iter_rows()}


def grouped(completions: pl.DataFrame, messages: Mapping[tuple[str, str], Messages]) -> Groups:
    """Completions by prompt and language, in the table's order, with the prompt's messages."""
    groups: dict[tuple[str, str], list[Completion]] = {}
    for row in completions.iter_rows(named=True):
        groups.setdefault((row["prompt_id"], row["language"]), []).append(row)
    return [(messages[key], rows) for key, rows in groups.items()]


def open_likelihood(
    policy: Policy, runtime: Runtime, mean: bool, adapter: Path | None = None
) -> tuple[HFLikelihood, Any]:
    """The policy, with an adapter if given, as a scorer of log-probabilities, and its tokenizer."""
    from croco.models.loading import load_causal
    from croco.models.transformers import HFLikelihood

    model, tokenizer = load_causal(*with_tuned(policy, adapter), runtime.device)
    return HFLikelihood(model, tokenizer, runtime.token_budget, name=policy.model, mean=mean), tokenizer


def score_likelihood(
    scorer: Any, tokenizer: Any, groups: Groups, instructions: Mapping[str, str]
) -> list[Scored]:
    """Log-probabilities under the prompts of `groups`; the end token counts where there was one."""
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
        stops = [row["finish_reason"] == "stop" for row in rows]
        fits = [
            i for i, length in enumerate(lengths)
            if length <= scorer.max_context and (sampled[i] or stops[i])
        ]  # fmt: skip
        scored.append(
            [
                too_long("prompt and completion", length, scorer.max_context) if sampled[i] else NO_TOKENS
                for i, length in enumerate(lengths)
            ]
        )
        if fits:
            requests.append(ScoreRequest(number, prompt, [sampled[i] for i in fits]))
            ended.append([stops[i] for i in fits])
            places.append(fits)
    for request, fits, values in zip(requests, places, scorer.score(requests, ended), strict=True):
        for i, value in zip(fits, values, strict=True):
            scored[request.key][i] = value
    return scored


def too_long(what: str, length: int, limit: int) -> str:
    """The reason why a sequence has no score; its own length is a detail, after the colon."""
    return f"the {what} is longer than {limit} tokens: it has {length}"


# The implicit reward ---------------------------------------------------------------------------------------------


def english_prompt(messages: Messages, language: str, instruction: str) -> Messages:
    """The English conversation with the instruction before its last user turn, naming the language in English."""
    copied = [{"role": message["role"], "content": message["content"]} for message in messages]
    for message in reversed(copied):
        if message["role"] == "user":
            asked = instruction.replace("{language}", languages.name(language))
            message["content"] = f"{asked}\n\n{message['content']}"
            return copied
    raise UserError("an instruction goes before a user turn, and the conversation has none")


def score_implicit(
    dpo: Any,
    reference: Any,
    tokenizer: Any,
    groups: Groups,
    prompts: Mapping[tuple[str, str], Messages],
    instruction: str,
) -> list[Scored]:
    """log p_dpo - log p_reference of every completion under its English prompt, or a reason where there is none. `dpo`
    and `reference` score summed log-probabilities; `prompts` are conversations by prompt_id and language."""
    asked: list[tuple[Messages, list[Completion]]] = []
    places: list[int] = []
    scored: list[Scored] = [[NO_ENGLISH] * len(rows) for _, rows in groups]
    for place, (_, rows) in enumerate(groups):
        prompt_id, language = rows[0]["prompt_id"], rows[0]["language"]
        english = prompts.get((prompt_id, ENGLISH))
        if english is not None:
            asked.append((english_prompt(english, language, instruction), rows))
            places.append(place)
    tuned, before = (score_likelihood(scorer, tokenizer, asked, {}) for scorer in (dpo, reference))
    for place, after, reference_scores in zip(places, tuned, before, strict=True):
        scored[place] = [_difference(one, other) for one, other in zip(after, reference_scores, strict=True)]
    return scored


def _difference(one: float | str, other: float | str) -> float | str:
    if isinstance(one, str) or isinstance(other, str):
        return one if isinstance(one, str) else other
    return one - other
