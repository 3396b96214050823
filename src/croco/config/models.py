"""The models of a recipe: policy, translator, reward model and judge; which weights, and how they are read."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator

from croco import languages
from croco.config.runtime import Positive, Section
from croco.errors import UserError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TranslationFormat = Literal["instruct", "translategemma", "tower", "tower-instruct"]
TranslationCheck = Literal["items", "numbers", "repetition", "length", "copy", "language"]
TranslationChecks = Annotated[tuple[TranslationCheck, ...], Field(strict=False)]


class Model(Section):
    model: str  # "lab:policy", a directory, or a hub id
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Dtype = "auto"


class Causal(Model):
    """A model that completes conversations."""

    chat_template: str | None = None  # a Jinja file that replaces the tokenizer's own


class Policy(Causal):
    model: str = "lab:policy"
    # per language, appended to the last user turn after a blank line
    instruction: dict[str, str] = Field(default_factory=dict)

    @field_validator("instruction")
    @classmethod
    def _check_codes(cls, value: dict[str, str]) -> dict[str, str]:
        for code in value:
            try:
                languages.check(code)
            except UserError as error:
                raise ValueError(str(error)) from None
        return value


class Translate(Causal):
    """Prompts are read in one language and translated into the others; without this section they are there already."""

    source: str = "en"  # the language that [prompts] is read in
    evaluation: bool = False  # the prompts of [evaluation] likewise
    format: TranslationFormat = "instruct"
    max_new_tokens: Positive = 8192  # per stretch of text; one that has not ended by then goes to the ledger
    checks: TranslationChecks = get_args(TranslationCheck)  # those that a translation must pass
    # translated characters per character; for Chinese or Japanese other values are right
    min_length_ratio: Annotated[float, Field(ge=0)] = 0.5
    max_length_ratio: Annotated[float, Field(gt=0)] = 2.5

    @field_validator("source")
    @classmethod
    def _check_code(cls, value: str) -> str:
        try:
            return languages.check(value)
        except UserError as error:
            raise ValueError(str(error)) from None


class Reward(Model):
    model: str = "lab:reward"
    max_tokens: Positive = 8192  # a longer conversation goes to the ledger


class Judge(Causal):
    """A model that is asked for verdicts, greedily."""

    max_new_tokens: Positive = 1024
