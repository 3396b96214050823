"""Which completion of a pool becomes the chosen one and which the rejected one.

A pool is the completions that compete: one prompt in one language, in all, or in a group. A rule (`croco.config.rules`)
names a target score; the completion nearest to it is picked, and the rejected one scores strictly below the chosen one.
Rows sorted by pool make every statistic a segmented reduction, so millions of completions need no loop.

Shapes: R rows, P pools, K pairs."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from croco.config.rules import Rule

NO_ROW = -1

Floats = NDArray[np.float64]
Scores = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Pools:
    """P pools over R rows sorted by pool: `number` of the pool (any rising numbers), finite `score`, and `order`, which
    comes first of equally near rows, each (R,). Statistics are float64 (P,)."""

    number: Ints
    score: Scores
    order: Ints

    @cached_property
    def starts(self) -> Ints:
        return np.flatnonzero(np.diff(self.number, prepend=-1)) if len(self.number) else np.empty(0, np.int64)

    @cached_property
    def sizes(self) -> Ints:
        return np.diff(self.starts, append=len(self.number))

    @cached_property
    def pool(self) -> NDArray[np.int32]:
        """The place of each row's pool among the pools, (R,)."""
        return np.repeat(np.arange(len(self.starts), dtype=np.int32), self.sizes)

    def reduce(self, function: np.ufunc, values: NDArray[np.floating]) -> Floats:
        if not len(values):
            return np.empty(0, np.float64)
        return function.reduceat(values, self.starts, dtype=np.float64 if function is np.add else None)

    @cached_property
    def max(self) -> Floats:
        return self.reduce(np.maximum, self.score).astype(np.float64)

    @cached_property
    def min(self) -> Floats:
        return self.reduce(np.minimum, self.score).astype(np.float64)

    @cached_property
    def mean(self) -> Floats:
        return self.reduce(np.add, self.score) / self.sizes

    @cached_property
    def std(self) -> Floats:
        """Of the population. In two passes, because the mean of squares minus the squared mean cancels."""
        return np.sqrt(self.reduce(np.add, np.square(self.score - self.mean[self.pool])) / self.sizes)

    def quantile(self, share: float) -> Floats:
        """Between neighbours it interpolates linearly."""
        rising = self.score[np.lexsort((self.score, self.pool))]
        position = share * (self.sizes - 1)
        below = np.floor(position).astype(np.int64)
        above = np.minimum(below + 1, self.sizes - 1)
        low = rising[self.starts + below].astype(np.float64)
        return np.asarray(low + (position - below) * (rising[self.starts + above] - low))

    def nearest(self, target: Floats, allowed: NDArray[np.bool_] | None = None) -> Ints:
        """The row of each pool whose score is nearest to the pool's target, (P,), the first by `order` of equally near
        ones. With `allowed` (R,) the others are out; NO_ROW where none is allowed."""
        distance = np.abs(self.score - target[self.pool])
        if allowed is not None:
            distance[~allowed] = np.inf
        smallest = self.reduce(np.minimum, distance)
        hits = np.flatnonzero((distance == smallest[self.pool]) & np.isfinite(distance))
        pool = self.pool[hits]
        if (pool[1:] == pool[:-1]).any():
            hits = hits[np.lexsort((self.order[hits], pool))]
        rows = np.full(len(self.starts), NO_ROW, np.int64)
        rows[self.pool[hits][::-1]] = hits[::-1]  # written last to first, so each pool keeps its first hit
        return rows


def select(
    pools: Pools, chosen: Rule, rejected: Rule, pairs_per_pool: int = 1, reference: Scores | None = None
) -> pl.DataFrame:
    """Up to `pairs_per_pool` pairs in every pool; no completion is used twice, except a reference.

    The rejected completion scores strictly below the chosen one, or there is no pair; targets stay from pair to pair.
    CroCo (arXiv 2605.26293): chosen = highest score, rejected = nearest to mean - 2 std (population std). `reference`
    (P,) are scores of gold completions (NaN: none), the chosen ones under the rule "reference". Columns, sorted by
    pool: `pool` (its place), `pair_id`, and the rows `chosen` (NO_ROW: the reference) and `rejected` (NO_ROW under
    "none")."""
    free = np.ones(len(pools.score), np.bool_)
    rounds = [_pairs(np.empty(0, np.int64), 0, np.empty(0, np.int64), np.empty(0, np.int64))]
    aim = chosen.target(pools) if len(pools.score) else None
    if aim is None and rejected.kind == "none":
        pairs_per_pool = 1  # there is one reference
    for number in range(pairs_per_pool if len(pools.score) else 0):
        if aim is None:
            assert reference is not None
            one, score = np.full(len(pools.starts), NO_ROW, np.int64), reference
            there = np.isfinite(reference)
        else:
            one = pools.nearest(aim, free)
            score, there = pools.score[one], one != NO_ROW
        other = np.full(len(one), NO_ROW, np.int64)
        if rejected.kind != "none":
            below = free & (pools.score < score[pools.pool])
            other = pools.nearest(rejected.target(pools, score.astype(np.float64)), below)
            there = there & (other != NO_ROW)
        if not there.any():
            break
        pool = np.flatnonzero(there)
        rounds.append(_pairs(pool, number, one[pool], other[pool]))
        free[one[pool][one[pool] != NO_ROW]] = False
        free[other[pool][other[pool] != NO_ROW]] = False
    return pl.concat(rounds).sort("pool", "pair_id")


def _pairs(pool: Ints, number: int, chosen: Ints, rejected: Ints) -> pl.DataFrame:
    columns = {"pool": pool, "pair_id": np.full(len(pool), number, np.int32)}
    return pl.DataFrame(columns | {"chosen": chosen, "rejected": rejected})


def share_above_minimum(rejected_score: NDArray[np.floating], pool_minimum: NDArray[np.floating]) -> float:
    """Share of pairs whose rejected completion scores above its pool's minimum, (K,) each; 0.0 without pairs."""
    return float(np.mean(rejected_score > pool_minimum)) if len(rejected_score) else 0.0


def expected_share(chosen: Rule, rejected: Rule, size: int) -> float:
    """The share of pools of this size in which a rule picks another completion than the minimum, if scores are
    Gaussian; simulated with a fixed seed (±1 %). No score lies below mean - std * sqrt(N - 1), so in small pools the
    rule is the minimum."""
    if size < 2 or rejected.kind in ("min", "none"):
        return 0.0
    simulated_pools = min(4000, max(20, 20_000_000 // size))  # what memory holds
    scores = np.random.default_rng(0).standard_normal((simulated_pools, size)).astype(np.float32)
    number = np.repeat(np.arange(simulated_pools), size)
    pools = Pools(number, scores.ravel(), np.tile(np.arange(size), simulated_pools))
    pairs = select(pools, chosen if chosen.kind != "reference" else Rule("max"), rejected)
    return share_above_minimum(
        pools.score[pairs["rejected"].to_numpy()], pools.min[pairs["pool"].to_numpy()].astype(np.float32)
    )
