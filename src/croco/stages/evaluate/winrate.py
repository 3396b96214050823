"""Win rates against a reference, plain and with the lengths of the completions taken out (1, 0, or ½ each)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from croco.stages.evaluate.stats import CHUNK, Interval, percentiles

PENALTY = 1.0
TOLERANCE, MOST_STEPS = 1e-10, 100
Array = NDArray[np.float64]


def scaled(length_differences: ArrayLike) -> Array:
    """x = tanh(Δ / std(Δ)), all 0 where std is 0."""
    delta = np.asarray(length_differences, dtype=np.float64)
    std = delta.std() if delta.size else 0.0
    return np.zeros_like(delta) if std == 0 else np.tanh(delta / std)


@dataclass(frozen=True)
class Fit:
    """The length-controlled win rate of one language, and of every resample: (R,), with its number of comparisons."""

    value: float
    size: int
    resampled: Array
    sizes: Array


def fit(preferences: ArrayLike, length_differences: ArrayLike, drawn: Array) -> Fit:
    """The win rate at equal length: σ(θ) of logit p = θ + φ·x, x = tanh(Δ / std(Δ)) (after Dubois et al. 2024, without
    their term for how hard a prompt is).

    preferences: (n,) in [0, 1]; length_differences: (n,), Δ in characters, model minus reference; std with ddof 0,
    scaled once, not in every resample; drawn: how often each comparison is drawn, (R, n). θ and φ maximise the
    log-likelihood, summed over comparisons, minus 1·φ². Where all lengths differ by the same, or all preferences are 0
    or 1, it is the mean. Raises ValueError for no or unequal numbers of values."""
    y, x = np.asarray(preferences, dtype=np.float64), scaled(length_differences)
    if y.shape != x.shape or y.ndim != 1 or not y.size:
        raise ValueError("expected one preference and one length difference per comparison")
    value = float(_win_rates(y, x, np.ones((1, y.size)))[0])
    return Fit(value, y.size, _win_rates(y, x, drawn), drawn.sum(axis=1))


def pooled(fits: Sequence[Fit]) -> Interval:
    """Several languages together, with the bootstrap interval: the mean of their length-controlled win rates, weighted
    by their comparisons, since lengths differ between languages."""
    total = sum(one.size for one in fits)
    sizes = np.sum([one.sizes for one in fits], axis=0)
    sums = np.sum([np.where(one.sizes > 0, one.resampled, 0.0) * one.sizes for one in fits], axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = percentiles(np.where(sizes > 0, sums / sizes, np.nan))
    return Interval(sum(one.value * one.size for one in fits) / total, float(low), float(high))


def _win_rates(y: Array, x: Array, counts: Array) -> Array:
    """σ(θ) of every resample: (R,) from y, x (n,) and how often each is drawn, (R, n); nan where none is."""
    rates = np.empty(len(counts))
    rows = max(1, CHUNK // len(y))
    for start in range(0, len(counts), rows):
        rates[start : start + rows] = _fit(y, x, counts[start : start + rows])
    return rates


def _fit(y: Array, x: Array, counts: Array) -> Array:
    """Newton's method on all resamples at once, from θ = logit of the mean and φ = 0."""
    size = counts.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(size > 0, counts @ y / size, np.nan)
    # θ runs to infinity where one side wins all; x without spread leaves nothing to take out
    todo = np.flatnonzero((mean > 0) & (mean < 1))
    if not x.any() or not todo.size:
        return mean
    weights = counts[todo]
    theta, phi = np.log(mean[todo] / (1 - mean[todo])), np.zeros(todo.size)
    for _ in range(MOST_STEPS):
        p = 1 / (1 + np.exp(-(theta[:, None] + phi[:, None] * x)))
        slope = weights * (y - p)
        curve = weights * p * (1 - p)
        gradient = slope.sum(axis=1), slope @ x - 2 * PENALTY * phi
        a, b, c = curve.sum(axis=1), curve @ x, curve @ (x * x) + 2 * PENALTY
        step_theta = (c * gradient[0] - b * gradient[1]) / (a * c - b * b)
        step_phi = (a * gradient[1] - b * gradient[0]) / (a * c - b * b)
        # damped: far out the curve is flat and a full step would overshoot
        scale = np.minimum(1.0, 2.0 / np.maximum(np.maximum(np.abs(step_theta), np.abs(step_phi)), 1e-300))
        theta, phi = theta + scale * step_theta, phi + scale * step_phi
        if max(np.abs(step_theta).max(), np.abs(step_phi).max()) < TOLERANCE:
            mean[todo] = 1 / (1 + np.exp(-theta))
            return mean
    raise ArithmeticError(f"the length-controlled win rate found no maximum in {MOST_STEPS} steps")
