"""`[arena]` of the recipe: every arm's greedy completions against the base's, before a judge."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from croco.config.runtime import Positive, Section


class Arena(Section):
    judge: Literal["model", "lab"] = "model"  # the model of [judge], or the lab's program
    source: str | None = None  # prompts of its own, as in [evaluation]; null is the prompts of [evaluation]
    split: str = "test"
    revision: str | None = None
    limit: Positive | None = None  # prompts per language, the first ones
    id_column: str = "prompt_id"
    language_column: str = "language"
    languages: Annotated[tuple[str, ...], Field(strict=False)] = ()  # none named: all that are evaluated
    max_new_tokens: Positive | None = None  # of a completion; null is evaluation.max_new_tokens
