"""Pools: the completions that compete with each other, as contiguous runs of sorted rows.

A pool is one prompt in one language ("language") or the same prompt in all its languages ("all"). Candidates
are sorted once by (prompt_id, language, sample_id); after that every pool is a slice and every statistic a
segmented reduction, so millions of completions need no Python loop and the order of the input cannot matter.
Only keys and scores come here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from croco.errors import UserError

KEY = ("prompt_id", "language", "sample_id")
POOL_KEYS = {"language": ("prompt_id", "language"), "all": ("prompt_id",)}


@dataclass(frozen=True)
class Pools:
    """P pools over R sorted candidate rows.

    `rows` holds the key columns and whatever else came with them; `scores` is (R,) float64; `starts`,
    `sizes`, `mean` and `std` (population, ddof 0) are (P,); `pool_of_row` is (R,).
    """

    rows: pl.DataFrame
    scores: NDArray[np.float64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    pool_of_row: NDArray[np.int64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    @property
    def num_pools(self) -> int:
        return len(self.starts)


def pool_key(pool: str) -> tuple[str, ...]:
    """The columns that tell pools apart; raises UserError for an unknown kind of pool."""
    if pool not in POOL_KEYS:
        raise UserError(f'The pool "{pool}" is unknown; expected one of {", ".join(map(repr, POOL_KEYS))}.')
    return POOL_KEYS[pool]


def build_pools(candidates: pl.DataFrame, pool: str) -> Pools:
    """Sort the candidates (columns prompt_id, language, sample_id, score; finite scores) and cut them into
    pools.

    Raises UserError when a key occurs twice or a score is not finite: either would change means silently.
    """
    columns = pool_key(pool)
    rows, new_prompt, new_language = sort_by_key(candidates, "candidates")
    scores = rows["score"].cast(pl.Float64).to_numpy()
    if not np.isfinite(scores).all():
        bad = rows.row(int(np.flatnonzero(~np.isfinite(scores))[0]), named=True)
        raise UserError(f"The score of {describe_key(bad)} is {bad['score']}; expected a finite number.")
    if rows.is_empty():
        none, nothing = np.empty(0, np.int64), np.empty(0, np.float64)
        return Pools(rows, nothing, none, none, none, nothing, nothing)
    starts = np.flatnonzero(new_language if "language" in columns else new_prompt)
    sizes = np.diff(starts, append=rows.height)
    pool_of_row = np.repeat(np.arange(len(starts)), sizes)
    mean = np.add.reduceat(scores, starts) / sizes
    # Two passes: squares of centred scores, because the mean of squares minus the squared mean cancels.
    variance = np.add.reduceat((scores - mean[pool_of_row]) ** 2, starts) / sizes
    return Pools(rows, scores, starts, sizes, pool_of_row, mean, np.sqrt(variance))


def sort_by_key(rows: pl.DataFrame, table: str) -> tuple[pl.DataFrame, NDArray[np.bool_], NDArray[np.bool_]]:
    """The rows in key order, with flags (R,) for the first row of every prompt and of every (prompt,
    language).

    Raises UserError naming `table` and the first key that occurs twice. Names become integers before anything
    is compared, and rows that come in order, as stages write them, are not sorted again.
    """
    prompts, languages = _codes(rows["prompt_id"]), _codes(rows["language"])
    samples = rows["sample_id"].cast(pl.Int64).to_numpy()
    pairs = prompts * (languages.max(initial=0) + 1) + languages
    in_order = (pairs[1:] > pairs[:-1]) | ((pairs[1:] == pairs[:-1]) & (samples[1:] > samples[:-1]))
    if not in_order.all():
        order = np.lexsort((samples, pairs))
        rows, prompts, pairs, samples = rows[order], prompts[order], pairs[order], samples[order]
    new_language = _changes(pairs)
    repeated = ~new_language & ~_changes(samples)
    if repeated.any():
        key = describe_key(rows.row(int(np.flatnonzero(repeated)[0]), named=True))
        raise UserError(f"The {table} hold {key} more than once; expected every key once.")
    return rows, _changes(prompts), new_language


def describe_key(row: dict[str, object]) -> str:
    """A key as error messages write it."""
    return f"prompt_id {row['prompt_id']!r}, language {row['language']!r}, sample_id {row['sample_id']}"


def _codes(names: pl.Series) -> NDArray[np.int64]:
    """Each name's place among the sorted distinct names, shape (R,)."""
    return names.cast(pl.Enum(names.unique().sort())).to_physical().cast(pl.Int64).to_numpy()


def _changes(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True on the first row and wherever a value differs from the one before, shape (R,)."""
    changed = np.ones(len(values), dtype=np.bool_)
    changed[1:] = values[1:] != values[:-1]
    return changed
