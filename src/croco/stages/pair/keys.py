"""Keys as numbers: (prompt_id, language, sample_id) of millions of rows, sorted and joined without comparing text.

Names are numbered by their place among all names in sorted order, so an order of numbers is an order of names and does
not depend on which table or row came first. Rows mostly come in runs of one prompt, so only the head of each run is
looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from croco.errors import UserError

KEY = ("prompt_id", "language", "sample_id")
REFERENCE = -1  # the sample_id of a gold completion

Ints = NDArray[np.int64]
Numbered = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]  # prompt, language, sample


class Names:
    """Numbers for names in the order they are met; `sorted` gives the names and each number's place among them."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def numbers(self, names: pl.Series) -> NDArray[np.int32]:
        """The number of every name, (R,)."""
        runs = names.rle().struct.unnest()
        heads = runs["value"].to_list()
        numbers = np.array([self._numbers.setdefault(name, len(self._numbers)) for name in heads], np.int32)
        return np.repeat(numbers, runs["len"].to_numpy())

    def sorted(self) -> tuple[list[str], NDArray[np.int32]]:
        """All names in order, and for each number the place of its name."""
        names = sorted(self._numbers)
        places = np.empty(len(names), np.int32)
        places[[self._numbers[name] for name in names]] = np.arange(len(names), dtype=np.int32)
        return names, places


@dataclass(frozen=True)
class Keys:
    """The keys of R rows: places in the sorted `prompts` (P,) and `languages`, and sample ids; each int32 (R,)."""

    prompts: pl.Series
    languages: list[str]
    prompt: NDArray[np.int32]
    language: NDArray[np.int32]
    sample: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.prompt)

    def take(self, rows: NDArray[np.integer]) -> Keys:
        """The keys of some rows, in that order."""
        return Keys(self.prompts, self.languages, self.prompt[rows], self.language[rows], self.sample[rows])

    def followed_by(self, other: Keys) -> Keys:
        """These keys and then the other's, which are numbered alike."""
        columns = ("prompt", "language", "sample")
        both = (np.concatenate([getattr(self, name), getattr(other, name)]) for name in columns)
        return Keys(self.prompts, self.languages, *both)

    def packed(self, span: int | None = None) -> Ints:
        """One int64 per key, in key order: equal only where the keys are (of tables packed with the same `span`, which
        is more than every sample id + 1). Raises UserError when they do not fit.
        """
        span = self.span if span is None else span
        if len(self.prompts) * len(self.languages) * span >= 2**63:
            raise UserError(f"sample_id {span - 2} is too large, expected the number of a sample")
        return (self.prompt.astype(np.int64) * len(self.languages) + self.language) * span + self.sample + 1

    @property
    def span(self) -> int:
        """The least span that `packed` can take."""
        return int(self.sample.max(initial=0)) + 2

    def describe(self, row: int) -> str:
        """A key as error messages write it."""
        prompt, language = self.prompts[int(self.prompt[row])], self.languages[self.language[row]]
        return f"prompt_id {prompt!r}, language {language!r}, sample_id {self.sample[row]}"


def number(table: pl.DataFrame, prompts: Names, languages: Names) -> Numbered:
    """Prompt and language numbers and sample ids of a table's rows; raises UserError for a null in a key."""
    for column in KEY:
        if table[column].null_count():
            row = table[column].is_null().arg_max()
            raise UserError(f"row {(row or 0) + 1} has no {column}, expected one")
    sample = table["sample_id"].cast(pl.Int32).to_numpy()
    if sample.size and sample.min() < REFERENCE:
        raise UserError(f"found sample_id {sample.min()}, expected the number of a sample, from 0 on")
    return prompts.numbers(table["prompt_id"]), languages.numbers(table["language"]), sample


def finish(prompts: Names, languages: Names, numbered: Sequence[Numbered]) -> list[Keys]:
    """Keys from numbers of one numbering, once all names are known."""
    prompt_names, prompt_places = prompts.sorted()
    language_names, language_places = languages.sorted()
    names = pl.Series(prompt_names, dtype=pl.String)  # once: a table is cut into many
    return [
        Keys(names, language_names, prompt_places[prompt], language_places[language], sample)
        for prompt, language, sample in numbered
    ]


def sorting(packed: Ints) -> Ints | None:
    """The order that sorts keys, or None when they are in order already, as stages write them."""
    if (packed[1:] > packed[:-1]).all():
        return None
    return np.argsort(packed, kind="stable")


def check_unique(keys: Keys, packed_sorted: Ints, order: Ints | None, table: str) -> None:
    """Raise UserError naming the table and the first key that occurs twice."""
    repeated = np.flatnonzero(packed_sorted[1:] == packed_sorted[:-1])
    if repeated.size:
        row = int(repeated[0]) if order is None else int(order[repeated[0]])
        raise UserError(f"{table}: {keys.describe(row)} occurs more than once, expected every key once")
