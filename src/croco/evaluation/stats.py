"""Means and their uncertainty: percentile bootstrap over prompts, in plain numpy.

The prompt is the unit that is resampled, never the completion: completions of one prompt resemble each other,
and so do the languages of one parallel prompt, so a group of languages is resampled jointly. Every metric of
a table shares one set of resamples (`resample_counts`), which makes differences between arms paired and a
whole table one matrix product. Engines, tables and files stay out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A value with the ends of its interval (95 % unless said otherwise)."""

    value: float
    low: float
    high: float


def resample_counts(num_prompts: int, seed: int, num_resamples: int = 2000) -> NDArray[np.float64]:
    """How often each prompt is drawn in each resample: (num_resamples, num_prompts), every row sums to
    num_prompts.
    """
    if num_prompts < 1 or num_resamples < 1:
        raise ValueError(
            f"expected at least one prompt and one resample, found {num_prompts} and {num_resamples}"
        )
    generator = np.random.default_rng(seed)
    drawn = generator.integers(num_prompts, size=(num_resamples, num_prompts))
    flat = drawn + num_prompts * np.arange(num_resamples)[:, None]
    counts = np.bincount(flat.ravel(), minlength=num_resamples * num_prompts)
    return counts.reshape(num_resamples, num_prompts).astype(np.float64)


def bootstrap_ratio(
    sums: NDArray[np.float64],
    weights: NDArray[np.float64],
    counts: NDArray[np.float64],
    confidence: float = CONFIDENCE,
) -> list[Interval]:
    """Intervals of M weighted means, sums.sum(0) / weights.sum(0), over the resamples in `counts`.

    sums, weights: (n, M), per prompt the sum of its values and how many they were; counts: (R, n). A prompt
    without values has weight 0. Resamples in which no weight is left are ignored. Percentile method (Efron
    and Tibshirani 1993, ch. 13). Raises ValueError when a column has no weight at all.
    """
    totals = weights.sum(axis=0)
    if not (totals > 0).all():
        raise ValueError("a metric without any value has no mean")
    values = sums.sum(axis=0) / totals
    resampled_weights = counts @ weights
    with np.errstate(invalid="ignore", divide="ignore"):
        resampled = np.where(resampled_weights > 0, (counts @ sums) / resampled_weights, np.nan)
    tail = 50.0 * (1.0 - confidence)
    low, high = np.nanpercentile(resampled, [tail, 100.0 - tail], axis=0)
    return [Interval(float(v), float(a), float(b)) for v, a, b in zip(values, low, high, strict=True)]


def bootstrap_mean(
    values: ArrayLike, seed: int, num_resamples: int = 2000, confidence: float = CONFIDENCE
) -> Interval:
    """Mean of one value per prompt, shape (n,), with its bootstrap interval. Raises ValueError when n is 0 or
    a value is not finite.
    """
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or not np.isfinite(column).all():
        raise ValueError("expected one finite value per prompt")
    counts = resample_counts(len(column), seed, num_resamples)
    return bootstrap_ratio(column[:, None], np.ones((len(column), 1)), counts, confidence)[0]


def verdict(difference: Interval) -> str:
    """What a difference's interval says: "better", "worse" or "not resolved" when it holds zero."""
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "not resolved"
