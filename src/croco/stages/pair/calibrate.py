"""Scores made comparable before pooling: across languages a reward model's raw scores favour some of them.

    none      as they are (the paper)
    zscore    minus the mean of the language, over its population std
    quantile  the share of the language's scores below, ties half: in (0, 1)
    centred   minus the mean of the prompt in the language
    length    minus alpha times the completion's tokens, alpha such that best and worst are equally long on average
              (ICR, arXiv 2503.04647)

Statistics are over all finite scores of the policy's completions, before guards; gold completions do not enter them.
Within a language only "quantile" selects otherwise than raw scores do: it bends the scale.

Shapes: R rows, L languages."""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from croco.config.rules import CALIBRATIONS
from croco.errors import UserError
from croco.storage.schemas import REFERENCE

Scores = NDArray[np.float32]


def calibrate(kind: str, rows: pl.DataFrame) -> Scores:
    """Calibrated scores, float32 (R,), of rows sorted by `pool` with the columns of a key and `score` (and
    completion_tokens for "length"). Scores that are all equal keep a std of 1. Raises UserError for an unknown kind,
    and "length" without lengths."""
    if kind not in CALIBRATIONS:
        known = ", ".join(f'"{name}"' for name in CALIBRATIONS)
        raise UserError(f'the calibration "{kind}" is unknown, expected one of {known}')
    score: Scores = rows["score"].to_numpy()
    if kind == "length":
        if "completion_tokens" not in rows.columns or rows["completion_tokens"].null_count():
            raise UserError('the calibration "length" needs completion_tokens, which these scores lack')
        lengths: Scores = rows["completion_tokens"].cast(pl.Float32).to_numpy()
        return without_length(score, lengths, rows["pool"].to_numpy())
    if kind == "none" or rows.is_empty():
        return score
    counted = np.isfinite(score) & (rows["sample_id"] != REFERENCE).to_numpy()
    language = rows["language"].to_physical().to_numpy()
    if kind == "quantile":
        return _quantiles(score, language, counted)
    group = language
    if kind == "centred":
        group = rows.select(pl.struct("prompt_id", "language").rank("dense")).to_series().to_numpy()
    num = np.bincount(group, counted)
    mean = np.bincount(group, np.where(counted, score, 0.0)) / np.maximum(num, 1)
    centred = score - mean[group]
    if kind == "zscore":
        std = np.sqrt(np.bincount(group, np.where(counted, centred, 0.0) ** 2) / np.maximum(num, 1))
        centred = centred / np.where(std > 0, std, 1.0)[group]
    return np.asarray(centred, np.float32)


def _quantiles(score: Scores, language: NDArray[np.integer], counted: NDArray[np.bool_]) -> Scores:
    shares = np.empty(len(score), np.float32)
    for code in np.unique(language):
        here = np.flatnonzero(language == code)
        rising = np.sort(score[here[counted[here]]])
        below = np.searchsorted(rising, score[here], "left") + np.searchsorted(rising, score[here], "right")
        shares[here] = below / (2 * max(len(rising), 1))
    return shares


def without_length(score: Scores, num_tokens: Scores, pool: NDArray[np.integer]) -> Scores:
    """Scores minus alpha times length, float32 (R,), of rows sorted by `pool`; alpha is where the mean difference in
    length of best and worst, which falls in steps as alpha rises, crosses zero."""
    if not len(score):
        return score
    rows = np.flatnonzero(np.isfinite(score))
    value, length = score[rows].astype(np.float64), num_tokens[rows].astype(np.float64)
    starts = np.flatnonzero(np.diff(pool[rows].astype(np.int64), prepend=-1))
    alpha = length_weight(value, length, starts)
    return (score - alpha * num_tokens.astype(np.float64)).astype(np.float32)


def length_weight(
    value: NDArray[np.float64], length: NDArray[np.float64], starts: NDArray[np.int64]
) -> float:
    """The alpha at which best and worst of the pools (rows from each of `starts` on) have equal mean length."""
    sizes = np.diff(starts, append=len(value))
    pool = np.repeat(np.arange(len(starts)), sizes)

    def longer(alpha: float) -> float:
        left = value - alpha * length
        rising = np.lexsort((left, pool))
        best, worst = rising[starts + sizes - 1], rising[starts]
        return float((length[best] - length[worst]).mean())

    scale = max(float(np.ptp(value)), 1e-6)
    low, high = -scale, scale  # a token more or less outweighs any difference in score
    if longer(low) <= 0 or longer(high) >= 0:
        return 0.0  # all completions of every pool are equally long
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if longer(middle) > 0 else (low, middle)
    return min((low, high), key=lambda alpha: abs(longer(alpha)))
