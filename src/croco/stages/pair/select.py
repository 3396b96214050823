"""Which completion of a pool becomes the chosen one and which the rejected one.

A rule names a target score; the completion whose score lies nearest to it is picked, and the rejected one must
lie strictly below the chosen one. "max" and "min" are targets like any other, so a new rule is one more line in
`targets`. Everything here is arithmetic on the sorted scores of `Pools`: text and tables never enter.

Shapes: R rows, P pools, K pairs, F references.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from croco.config.rules import Rule
from croco.stages.pair.pools import Pools, build_pools

NO_ROW = -1

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class References:
    """Gold completions that may be chosen and are no members of a pool: pool number and score, (F,)."""

    pool: Ints
    score: NDArray[np.float32]


@dataclass(frozen=True)
class Selection:
    """K pairs in the order of their pools: `pool`, the `number` of the pair in its pool, the rows `chosen` and
    `rejected`, each (K,). A chosen row from R on is the reference of that number; `rejected` is NO_ROW under
    the rule "none".
    """

    pool: Ints
    number: Ints
    chosen: Ints
    rejected: Ints


def targets(rule: Rule, pools: Pools) -> Floats:
    """The rule's target score in every pool, (P,); quantiles interpolate linearly between neighbours."""
    if rule.kind == "max":
        return np.maximum.reduceat(pools.score, pools.starts).astype(np.float64)
    if rule.kind == "min":
        return np.minimum.reduceat(pools.score, pools.starts).astype(np.float64)
    if rule.kind == "mean":
        return pools.mean + rule.amount * pools.std
    rising = _rising(pools)
    position = rule.amount * (pools.sizes - 1)
    below = np.floor(position).astype(np.int64)
    above = np.minimum(below + 1, pools.sizes - 1)
    low = rising[pools.starts + below].astype(np.float64)
    return np.asarray(low + (position - below) * (rising[pools.starts + above] - low))


def _rising(pools: Pools) -> NDArray[np.float32]:
    """The scores sorted within each pool, (R,): one sort of integers that hold the pool above the score's bits."""
    bits = (pools.score + np.float32(0)).view(np.int32)  # -0 is 0
    ordered = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))  # integers in the order of the floats
    packed = (pools.pool.astype(np.int64) << 32) + (ordered.astype(np.int64) + 2**31)
    packed.sort()
    ordered = ((packed & 0xFFFFFFFF) - 2**31).astype(np.int32)
    return (ordered ^ ((ordered >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)


def nearest(target: Floats, pools: Pools, allowed: NDArray[np.bool_] | None = None) -> Ints:
    """The row of each pool whose score is nearest to the pool's target, (P,).

    Of equally near rows the first by `order` wins, so the order of the input cannot matter. With `allowed` (R,)
    the others are out; NO_ROW where no row is allowed.
    """
    distance = pools.score - target[pools.pool]
    np.abs(distance, out=distance)
    if allowed is not None:
        distance[~allowed] = np.inf
    smallest = np.minimum.reduceat(distance, pools.starts)
    hits = np.flatnonzero((distance == smallest[pools.pool]) & np.isfinite(distance))
    hit_pools = pools.pool[hits]
    if (hit_pools[1:] == hit_pools[:-1]).any():
        hits = hits[np.lexsort((pools.order[hits], hit_pools))]
    rows = np.full(len(pools), NO_ROW, dtype=np.int64)
    rows[pools.pool[hits][::-1]] = hits[::-1]  # written last to first, so each pool keeps its first hit
    return rows


def select(
    pools: Pools,
    chosen: Rule,
    rejected: Rule,
    pairs_per_pool: int = 1,
    references: References | None = None,
) -> Selection:
    """Pick up to `pairs_per_pool` pairs in every pool; no completion is used twice, except a reference.

    The rejected completion scores strictly below the chosen one, or there is no pair. Targets belong to the
    whole pool and stay as they are from pair to pair. CroCo (arXiv 2605.26293): chosen = highest score,
    rejected = nearest to mean - 2 std (population std).
    """
    rounds: list[tuple[Ints, int, Ints, Ints]] = []
    if len(pools):
        free = np.ones(len(pools.score), dtype=np.bool_)
        gold = _best_reference(pools, references) if chosen.kind == "reference" else None
        aim = None if gold is not None else targets(chosen, pools)
        for number in range(pairs_per_pool):
            if gold is not None:
                assert references is not None
                first = gold
                score = np.append(references.score, np.float32(np.nan))[gold]
            else:
                assert aim is not None
                first = nearest(aim, pools, free if number else None)
                score = pools.score[first]
            last = _rejected(pools, rejected, score, free if number else None)
            there = first != NO_ROW if last is None else (first != NO_ROW) & (last != NO_ROW)
            if not there.any():
                break
            at = np.flatnonzero(there)
            second = np.full(len(at), NO_ROW, np.int64) if last is None else last[at]
            rounds.append((at, number, first[at] + (0 if gold is None else len(pools.score)), second))
            if gold is None:
                free[first[at]] = False
            free[second[second != NO_ROW]] = False
    if not rounds:
        none = np.empty(0, np.int64)
        return Selection(none, none, none, none)
    numbers = np.concatenate([np.full(len(at), number) for at, number, _, _ in rounds])
    pool, one, other = (np.concatenate([r[column] for r in rounds]) for column in (0, 2, 3))
    by_pool = np.lexsort((numbers, pool))
    return Selection(pool[by_pool], numbers[by_pool], one[by_pool], other[by_pool])


def _rejected(
    pools: Pools, rule: Rule, chosen_score: NDArray[np.float32], free: NDArray[np.bool_] | None
) -> Ints | None:
    """The rejected row of every pool under the chosen scores (P,), or None under the rule "none"."""
    if rule.kind == "none":
        return None
    below = pools.score < chosen_score[pools.pool]
    if free is not None:
        below &= free
    aim = chosen_score - np.float64(rule.amount) if rule.kind == "gap" else targets(rule, pools)
    return nearest(aim, pools, below)


def _best_reference(pools: Pools, references: References | None) -> Ints:
    """The reference of each pool with the highest score (the first of equals), or NO_ROW, (P,)."""
    best = np.full(len(pools), NO_ROW, dtype=np.int64)
    if references is not None:
        falling = np.lexsort((np.arange(len(references.score)), -references.score, references.pool))
        best[references.pool[falling][::-1]] = falling[::-1]
    return best


def share_above_minimum(rejected_score: NDArray[np.float32], pool_minimum: NDArray[np.float32]) -> float:
    """Share of pairs whose rejected completion scores above its pool's minimum, (K,) each; 0.0 without pairs."""
    return float(np.mean(rejected_score > pool_minimum)) if len(rejected_score) else 0.0


def expected_share(chosen: Rule, rejected: Rule, size: int, simulated_pools: int = 4000) -> float:
    """The share of pools of this size in which a rule picks another completion than the minimum, if scores are
    Gaussian.

    Simulated with a fixed seed (±1 % at one standard error). With population std no score lies below mean - std
    * sqrt(N - 1), and few lie below mean - 2 std: in small pools the rule is the minimum by another name.
    """
    if size < 2 or rejected.kind in ("min", "none"):
        return 0.0
    scores = np.random.default_rng(0).standard_normal((simulated_pools, size)).astype(np.float32)
    pool = np.repeat(np.arange(simulated_pools), size)
    pools = build_pools(pool, scores.ravel(), np.tile(np.arange(size), simulated_pools))
    found = select(pools, chosen if chosen.kind != "reference" else Rule("max"), rejected)
    return share_above_minimum(pools.score[found.rejected], scores.min(axis=1)[found.pool])
