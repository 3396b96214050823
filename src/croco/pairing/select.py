"""Which completion of a pool becomes the chosen one and which the rejected one.

A rule names a target score; the completion whose score lies nearest to it is picked, and the rejected one
must lie strictly below the chosen one. "max" and "min" are targets like any other, so a new rule is one more
line in `targets`. Everything here is arithmetic on the sorted scores of `Pools`: text and tables never enter.
Guards and prompts have rooms of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from croco.errors import UserError
from croco.pairing.pools import Pools

NO_ROW = -1

_NUMBER = r"\d+(?:\.\d+)?"
_MEAN = re.compile(rf"mean(?:([+-])({_NUMBER})\*?std)?")
_QUANTILE = re.compile(rf"quantile:({_NUMBER})")


@dataclass(frozen=True)
class Rule:
    """A target score: `kind` is "max", "min", "mean" or "quantile"; `amount` is the number of population
    standard deviations from the mean, or the quantile in [0, 1].
    """

    kind: str
    amount: float = 0.0


@dataclass(frozen=True)
class Selection:
    """Rows of the sorted candidates, one entry per pool; `NO_ROW` where a pool has no such completion."""

    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]


def parse_rule(text: str) -> Rule:
    """Read a rule as recipes write it: "max", "min", "mean", "mean-2std", "mean+0.5*std", "quantile:0.1",
    "q1".

    Raises UserError for anything else.
    """
    if text in ("max", "min"):
        return Rule(text)
    if text == "q1":
        return Rule("quantile", 0.25)
    if match := _MEAN.fullmatch(text):
        sign = -1.0 if match[1] == "-" else 1.0
        return Rule("mean", sign * float(match[2]) if match[2] else 0.0)
    if (match := _QUANTILE.fullmatch(text)) and float(match[1]) <= 1.0:
        return Rule("quantile", float(match[1]))
    raise UserError(
        f'The selection rule "{text}" is unknown; expected "max", "min", "mean", "mean-K*std", "quantile:Q" or "q1".'
    )


def targets(rule: Rule, pools: Pools) -> NDArray[np.float64]:
    """The rule's target score in every pool, shape (P,); quantiles interpolate linearly between neighbours."""
    if rule.kind == "max":
        return np.asarray(np.maximum.reduceat(pools.scores, pools.starts))
    if rule.kind == "min":
        return np.asarray(np.minimum.reduceat(pools.scores, pools.starts))
    if rule.kind == "mean":
        return pools.mean + rule.amount * pools.std
    order = np.lexsort((pools.scores, pools.pool_of_row))  # scores rise inside each pool
    position = rule.amount * (pools.sizes - 1)
    below = np.floor(position).astype(np.int64)
    above = np.minimum(below + 1, pools.sizes - 1)
    low, high = pools.scores[order[pools.starts + below]], pools.scores[order[pools.starts + above]]
    return np.asarray(low + (position - below) * (high - low))


def nearest(
    target: NDArray[np.float64], pools: Pools, allowed: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """The row of each pool whose score is nearest to the pool's target, shape (P,).

    Of equally near rows the first in key order (language, sample_id) wins, so the order of the input cannot
    matter. With `allowed` (one flag per row) the others are out; `NO_ROW` where no row is allowed.
    """
    distance = np.abs(pools.scores - target[pools.pool_of_row])
    if allowed is not None:
        distance[~allowed] = np.inf
    smallest = np.minimum.reduceat(distance, pools.starts)
    hits = np.flatnonzero((distance == smallest[pools.pool_of_row]) & np.isfinite(distance))
    rows = np.full(pools.num_pools, NO_ROW, dtype=np.int64)
    rows[pools.pool_of_row[hits][::-1]] = hits[
        ::-1
    ]  # written last to first, so each pool keeps its first hit
    return rows


def select(pools: Pools, chosen: Rule, rejected: Rule) -> Selection:
    """Pick one pair per pool; the rejected completion scores strictly below the chosen one, or there is none.

    CroCo (arXiv 2605.26293): chosen = highest score, rejected = nearest to mean - 2 std (population std).
    """
    if pools.num_pools == 0:
        return Selection(np.empty(0, np.int64), np.empty(0, np.int64))
    chosen_rows = nearest(targets(chosen, pools), pools)
    strictly_below = pools.scores < pools.scores[chosen_rows][pools.pool_of_row]
    return Selection(chosen_rows, nearest(targets(rejected, pools), pools, strictly_below))


def share_other_than_minimum(pools: Pools, selection: Selection) -> float:
    """Share of the pools with a pair in which the rejected completion scores above the pool's minimum; 0.0
    without pairs.

    With few completions mean - 2 std lies below every score and the rule is the minimum under another name.
    """
    paired = selection.rejected != NO_ROW
    if not paired.any():
        return 0.0
    minimum = np.minimum.reduceat(pools.scores, pools.starts)
    return float(np.mean(pools.scores[selection.rejected[paired]] > minimum[paired]))
