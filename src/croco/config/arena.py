"""Where prompts come from, in `[prompts]`, `[evaluation]` and `[arena]`; and `[arena]` itself: every arm's greedy
completions against the base's, before a judge.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from croco import languages
from croco.config.runtime import Positive, Section
from croco.errors import UserError

BY_LANGUAGE = "{language}"


class Source(Section):
    """Prompts of the lab, of files, or of a dataset of the hub.

    `{language}` in source, config, split or data_files stands for each language in turn.
    """

    source: str | None = None  # "lab", a file, a pattern, a folder, or "hf:NAME" (with ?config=NAME)
    split: str = "train"  # of the lab or a hub dataset; files have none
    config: str | None = None  # of a hub dataset
    revision: str | None = None  # of a hub dataset: a commit, tag or branch
    data_files: Annotated[
        tuple[str, ...], Field(strict=False)
    ] = ()  # of a folder or hub dataset: which of its files
    limit: Positive | None = None  # prompts per language, the first ones
    id_column: str = "prompt_id"
    language_column: str = "language"
    language: str | None = None  # of all rows that say none
    # our names for columns, and those of the file where they differ
    columns: dict[Literal["prompt", "system", "reference", "source", "domain"], str] = Field(
        default_factory=dict
    )

    @field_validator("language")
    @classmethod
    def _check_code(cls, value: str | None) -> str | None:
        try:
            return None if value is None else languages.check(value)
        except UserError as error:
            raise ValueError(str(error)) from None

    @property
    def by_language(self) -> bool:
        """Whether every language has a source of its own."""
        return any(
            BY_LANGUAGE in str(value) for value in (self.source, self.config, self.split, self.data_files)
        )

    def of(self, language: str | None) -> dict[str, Any]:
        """source, config, split, revision and data_files, for one language where every language has its own."""
        name, _, query = (
            str(self.source).partition("?config=")
            if str(self.source).startswith("hf:")
            else (self.source, "", "")
        )
        values = {
            "source": name,
            "config": query or self.config,
            "split": self.split,
            "revision": self.revision,
        }
        made = {
            key: value and value.replace(BY_LANGUAGE, language or BY_LANGUAGE)
            for key, value in values.items()
        }
        return made | {
            "data_files": [one.replace(BY_LANGUAGE, language or BY_LANGUAGE) for one in self.data_files]
        }


class Arena(Source):
    judge: Literal["model", "lab"] = "model"  # the model of [judge], or the lab's program
    source: str | None = None  # prompts of its own; null is the prompts of [evaluation]
    split: str = "test"
    languages: Annotated[tuple[str, ...], Field(strict=False)] = ()  # none named: all that are evaluated
    max_new_tokens: Positive | None = None  # of a completion; null is evaluation.max_new_tokens


def has_splits(source: str) -> bool:
    """Whether a source has splits: the lab, the hub, and a folder that `save_to_disk` made of several."""
    saved = os.path.join(os.path.expanduser(source), "dataset_dict.json")
    return source == "lab" or source.startswith("hf:") or os.path.isfile(saved)
