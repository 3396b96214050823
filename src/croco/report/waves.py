"""How many completions are worth it, and would it pay to stop early where another wave promises little?

From the shared samples of every seed: the first N completions of each prompt (fixed), or waves until the expected gain
of the next one falls under a threshold (adaptive), per language and pooled over all. Quality is that of the pairs: how
often the best-scored completion is verified as good, and how often the one that mean − 2·std rejects is; cost is
tokens. The expected gain of k more scores over the best so far is k·σ·(φ(z) − z·(1 − Φ(z))), z = (best − mean) / σ: the
expected improvement of one normal draw, summed over the draws, which bounds that of their maximum.

Shapes: Q pools, N completions of a pool in the order in which they are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from croco.storage.shards import read_table

KEY = ["prompt_id", "language", "sample_id"]
FIXED = (2, 4, 8, 16, 32, 64)
WAVE = 4  # completions in a wave; of a pool over all languages, one in each
THRESHOLDS = (0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)  # in standard deviations of the pool
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pools:
    """Scores (−inf: no candidate), tokens and verified goodness, (Q, N); N counts completions of `width` languages."""

    scores: Floats
    tokens: Floats
    good: Floats
    width: int


@dataclass(frozen=True)
class Point:
    """One way to stop: completions and tokens a prompt and language, shares of chosen and of rejected that are good."""

    rule: str
    completions: float
    tokens: float
    chosen_good: float
    rejected_good: float


def read_pools(run: Path, pooled: bool) -> Pools:
    """The pools of a run with the lab's prompts: of one prompt in one language, or of a prompt in all of them."""
    from croco.lab.world import verify

    columns = [*KEY, "completion", "completion_tokens", "finish_reason"]
    rows = read_table(run / "sample", columns).join(
        read_table(run / "score", [*KEY, "score"]), on=KEY, how="left"
    )
    rows = rows.sort(["prompt_id", "sample_id", "language"] if pooled else KEY)
    keys = rows.select("prompt_id", "language", "completion").iter_rows()
    good = np.array([verify(*key).good for key in keys], dtype=np.float64)
    candidate = (
        (rows["finish_reason"] == "stop")
        & (rows["completion"].str.strip_chars() != "")
        & rows["score"].is_not_null()
    )
    scores = np.where(candidate.to_numpy(), rows["score"].fill_null(0).to_numpy().astype(float), -np.inf)
    width = rows["language"].n_unique() if pooled else 1
    count = (int(rows["sample_id"].to_numpy().max()) + 1) * width
    shape = (-1, count)
    tokens = rows["completion_tokens"].to_numpy().astype(float)
    return Pools(scores.reshape(shape), tokens.reshape(shape), good.reshape(shape), width)


def points(pools: Sequence[Pools]) -> list[Point]:
    """Every fixed number and every threshold, over the pools of all seeds."""
    width, drawn = pools[0].width, pools[0].scores.shape[1]
    ways = [(f"{n}", [np.full(len(p.scores), n * width) for p in pools]) for n in FIXED if n * width <= drawn]
    ways += [(f"gain < {t:g}·std", [stops(p, t) for p in pools]) for t in THRESHOLDS]
    found = []
    for rule, lengths in ways:
        each = np.concatenate([np.stack(_outcome(p, n), axis=1) for p, n in zip(pools, lengths, strict=True)])
        each = each[~np.isnan(each).any(axis=1)]
        count, tokens, chosen, rejected = each.mean(axis=0)
        found.append(Point(rule, count / width, tokens / width, chosen, rejected))
    return found


def stops(pools: Pools, threshold: float) -> NDArray[np.int64]:
    """How many completions of each pool are drawn, (Q,): wave by wave, at least two."""
    num_pools, drawn = pools.scores.shape
    wave = WAVE if pools.width == 1 else pools.width
    lengths = np.full(num_pools, drawn)
    going = np.ones(num_pools, bool)
    for stop in range(2 * wave, drawn, wave):
        mean, std, best = _moments(pools.scores[:, :stop])
        z = (best - mean) / std
        above = np.array([0.5 * math.erfc(x / math.sqrt(2)) for x in z])
        gain = wave * (np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) - z * above)  # in standard deviations
        ended = going & (gain < threshold)
        lengths[ended], going = stop, going & ~ended
    return lengths


def _moments(scores: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean, population std (1 where there is nothing) and maximum of the candidates, (Q,) each."""
    there = np.isfinite(scores)
    count = np.maximum(there.sum(axis=1), 1)
    mean = np.where(there, scores, 0.0).sum(axis=1) / count
    std = np.sqrt((np.where(there, scores - mean[:, None], 0.0) ** 2).sum(axis=1) / count)
    best = np.where(there.any(axis=1), scores.max(axis=1), mean)
    return mean, np.where(std > 0, std, 1.0), best


def _outcome(pools: Pools, lengths: NDArray[np.int64]) -> tuple[Floats, Floats, Floats, Floats]:
    """Completions, tokens, whether the chosen and whether the rejected is good, (Q,) each; NaN without a pair."""
    order = np.arange(pools.scores.shape[1])
    inside = order < lengths[:, None]
    scores = np.where(inside, pools.scores, -np.inf)
    mean, std, best = _moments(scores)
    rows, first = np.arange(len(scores)), scores.argmax(axis=1)
    away = np.where(
        np.isfinite(scores) & (scores < best[:, None]), np.abs(scores - (mean - 2 * std)[:, None]), np.inf
    )
    last = away.argmin(axis=1)
    pair = np.isfinite(away[rows, last])
    chosen = np.where(pair, pools.good[rows, first], np.nan)
    rejected = np.where(pair, pools.good[rows, last], np.nan)
    return lengths.astype(float), np.where(inside, pools.tokens, 0.0).sum(axis=1), chosen, rejected


def saved(found: Sequence[Point], at: Point) -> float | None:
    """The share of tokens that the cheapest adaptive rule saves beside the cheapest fixed number, both as good."""
    as_good = [p for p in (*found, at) if p.chosen_good >= at.chosen_good]
    adaptive = [p.tokens for p in as_good if p.rule.startswith("gain")]
    fixed = [p.tokens for p in as_good if not p.rule.startswith("gain")]
    return 1 - min(adaptive) / min(fixed) if adaptive else None
