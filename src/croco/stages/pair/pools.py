"""Pools: the completions that compete with each other, as contiguous runs of sorted rows.

A pool is one prompt in one language ("language"), the same prompt in all its languages ("all"), or in the languages of
a named group (`{nordic = ["da", "nb", "sv"]}`; a language in no group is a pool of its own). Rows sorted by pool make
every pool a slice and every statistic a segmented reduction, so millions of completions need no Python loop. Only
numbers come here.

Shapes: R rows, P pools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from croco.config.rules import check_groups

Groups = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Pools:
    """P pools over R rows: `score` float32 and `order` int64 (R,), who comes first of equally near rows; `pool` int32
    (R,); `starts`, `sizes`, and population `mean` and `std` float64 (P,).
    """

    score: NDArray[np.float32]
    order: NDArray[np.int64]
    pool: NDArray[np.int32]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.starts)


def groups_of(pool: str | Groups, languages: Sequence[str]) -> tuple[list[str], NDArray[np.int32]]:
    """Names of the groups, and the group of each language, (L,). Raises UserError as `check_groups` does."""
    if pool == "all":
        return ["all"], np.zeros(len(languages), np.int32)
    if pool == "language":
        return list(languages), np.arange(len(languages), dtype=np.int32)
    owner = check_groups(pool, languages)
    names = list(
        dict.fromkeys(owner.get(code, code) for code in languages)
    )  # in the order of their first language
    return names, np.array([names.index(owner.get(code, code)) for code in languages], np.int32)


def build_pools(pool: NDArray[np.integer], score: NDArray[np.float32], order: NDArray[np.int64]) -> Pools:
    """Pools of rows that come sorted by pool (any increasing numbers, (R,)); scores must be finite."""
    starts = np.flatnonzero(np.diff(pool, prepend=-1)) if len(pool) else np.empty(0, np.int64)
    sizes = np.diff(starts, append=len(pool))
    of_row = np.repeat(np.arange(len(starts), dtype=np.int32), sizes)
    if not len(pool):
        nothing = np.empty(0, np.float64)
        return Pools(score, order, of_row, starts, sizes, nothing, nothing)
    mean = np.add.reduceat(score, starts, dtype=np.float64) / sizes
    # two passes: squares of centred scores, because the mean of squares minus the squared mean cancels
    centred = score - mean[of_row]
    np.square(centred, out=centred)
    return Pools(score, order, of_row, starts, sizes, mean, np.sqrt(np.add.reduceat(centred, starts) / sizes))
