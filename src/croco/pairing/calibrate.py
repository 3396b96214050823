"""Scores made comparable before pooling: across languages a reward model's raw scores favour some of them.

    none      as they are (the paper)
    zscore    minus the mean of the language, over its population std
    quantile  the share of the language's scores below, ties half: in (0, 1)
    centred   minus the mean of the prompt in the language

Statistics are over all finite scores of the policy's completions, before guards: they describe the reward model, not
the selection. Gold completions are calibrated by them and do not enter them. Within a language "zscore" and "centred"
select as raw scores do (but for rounding); "quantile" does not: it bends the scale.

Shapes: R rows, L languages.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from croco.errors import UserError
from croco.pairing.rules import CALIBRATIONS


def calibrate(
    kind: str,
    score: NDArray[np.float32],
    language: NDArray[np.int32],
    prompt_in_language: NDArray[np.int64],
    counted: NDArray[np.bool_],
) -> NDArray[np.float32]:
    """Calibrated scores, float32 (R,), of raw ones (R,) by `language` or `prompt_in_language`, both numbers from 0 on.

    `counted` rows make the statistics. A language or prompt whose scores are all equal keeps a std of 1. Raises
    UserError for an unknown kind.
    """
    if kind not in CALIBRATIONS:
        known = ", ".join(f'"{name}"' for name in CALIBRATIONS)
        raise UserError(f'the calibration "{kind}" is unknown, expected one of {known}')
    if kind == "none" or not len(score):
        return score
    if kind == "quantile":
        return _quantiles(score, language, counted)
    group = language if kind == "zscore" else prompt_in_language
    num = np.bincount(group, counted)
    weights = np.where(counted, score, 0.0)
    mean = np.bincount(group, weights) / np.maximum(num, 1)
    centred = score - mean[group]
    if kind == "centred":
        return centred.astype(np.float32)
    std = np.sqrt(np.bincount(group, np.where(counted, centred, 0.0) ** 2) / np.maximum(num, 1))
    return (centred / np.where(std > 0, std, 1.0)[group]).astype(np.float32)


def _quantiles(
    score: NDArray[np.float32], language: NDArray[np.int32], counted: NDArray[np.bool_]
) -> NDArray[np.float32]:
    found = np.empty(len(score), np.float32)
    for code in np.unique(language):
        here = np.flatnonzero(language == code)
        rising = np.sort(score[here[counted[here]]])
        below = np.searchsorted(rising, score[here], "left") + np.searchsorted(rising, score[here], "right")
        found[here] = below / (2 * max(len(rising), 1))
    return found
