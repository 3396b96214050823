"""The implicit reward of a DPO arm, read across languages (ICR, arXiv 2503.04647).

A policy tuned by DPO on English judges other languages too, when it is asked in English: the score of y is log p_dpo(y
| x) - log p_reference(y | x), summed over y's tokens, where x is the English prompt with an instruction to answer in
y's language. Length is taken out when pairs are chosen (`calibration = "length"`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from croco import languages
from croco.config.arms import ENGLISH
from croco.errors import UserError
from croco.stages.score.policy_logprobs import Completion, Groups, Messages, Scored, score_likelihood

NO_ENGLISH = "the prompt has no English version"


def english_prompt(messages: Messages, language: str, instruction: str) -> Messages:
    """The English conversation with the instruction before its last user turn, naming the language in English."""
    copied = [{"role": message["role"], "content": message["content"]} for message in messages]
    for message in reversed(copied):
        if message["role"] == "user":
            asked = instruction.replace("{language}", languages.name(language))
            message["content"] = f"{asked}\n\n{message['content']}"
            return copied
    raise UserError("an instruction needs a user turn to stand before, and the conversation has none")


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
