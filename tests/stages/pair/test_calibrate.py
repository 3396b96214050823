"""Calibration by hand: statistics of the language, or of the prompt in it, over the counted rows."""

import numpy as np
import polars as pl
import pytest

import croco
from croco.errors import UserError
from croco.stages.pair.calibrate import calibrate, without_length

SCORES = np.array([0, 2, 4, 10, 10, np.nan, 7], np.float32)
LANGUAGE = ["da", "da", "da", "nl", "nl", "nl", "da"]
PROMPT = np.array([0, 0, 1, 2, 2, 2, 1], np.int64)  # of the prompt in its language
COUNTED = np.array([True] * 5 + [False, False])  # not the NaN, and not a gold completion (the last)


def test_by_hand():
    rows = pl.DataFrame(
        {
            "prompt_id": PROMPT,
            "language": LANGUAGE,
            "sample_id": np.where(COUNTED | np.isnan(SCORES), 0, -1),
            "score": SCORES,
        },
        schema_overrides={"language": pl.Enum(["da", "nl"]), "score": pl.Float32},
    )

    def made(kind: str) -> list[float]:
        return calibrate(kind, rows).tolist()

    std = np.sqrt(8 / 3)  # of 0, 2, 4 around 2; the other language is constant and keeps a std of 1
    assert made("none") == pytest.approx(SCORES.tolist(), nan_ok=True)
    assert made("zscore") == pytest.approx([-2 / std, 0, 2 / std, 0, 0, np.nan, 5 / std], nan_ok=True)
    assert made("quantile")[:5] == pytest.approx([1 / 6, 3 / 6, 5 / 6, 0.5, 0.5])
    assert made("quantile")[6] == 1.0  # above all of them
    assert made("centred") == pytest.approx([-1, 1, 0, 0, 0, np.nan, 3], nan_ok=True)
    with pytest.raises(UserError, match='"rank" is unknown'):
        made("rank")


def test_it_takes_the_language_out_of_a_pool_over_languages():
    rng = np.random.default_rng(0)
    size = 2 * 200 * 16
    row = np.arange(size)
    score = np.where(row // 16 % 2, 3 + 0.2 * rng.normal(size=size), rng.normal(size=size))
    table = pl.DataFrame({"prompt_id": row // 32, "sample_id": row % 16, "score": score}).with_columns(
        pl.col("prompt_id").cast(pl.String), language=pl.Series(np.where(row // 16 % 2, "da", "nl"))
    )
    shares = {
        kind: (croco.pairs(table, pool="all", calibration=kind)[0]["chosen_language"] == "da").mean()
        for kind in ("none", "zscore", "quantile", "centred")
    }
    assert shares["none"] > 0.95
    assert shares["zscore"] == pytest.approx(0.5, abs=0.1)
    assert shares["quantile"] == pytest.approx(0.5, abs=0.1)
    assert shares["centred"] < 0.1  # the location is gone, the spread is not


def test_length_is_taken_out_until_best_and_worst_are_equally_long() -> None:
    """Scores that are nine tenths length: raw, the best are long and the worst short."""
    rng = np.random.default_rng(0)
    pool = np.repeat(np.arange(400), 8).astype(np.int32)
    tokens = rng.integers(5, 60, len(pool)).astype(np.float32)
    quality = rng.normal(size=len(pool))
    score = (quality + 0.3 * tokens).astype(np.float32)

    def gap(value: np.ndarray) -> float:
        rows = value.reshape(400, 8)
        lengths = tokens.reshape(400, 8)
        best, worst = (
            np.take_along_axis(lengths, pick(rows, 1)[:, None], 1) for pick in (np.argmax, np.argmin)
        )
        return float((best - worst).mean())

    controlled = without_length(score, tokens, pool)
    assert gap(score) > 20
    assert abs(gap(controlled)) < 0.5
    # alpha is near the weight that length had, so what is left is quality
    assert np.corrcoef(controlled, quality)[0, 1] > 0.99
    # a score that is not finite takes no part
    broken = np.append(score, np.float32(np.nan))
    found = without_length(broken, np.append(tokens, np.float32(9)), np.append(pool, np.int32(399)))
    assert np.isnan(found[-1])
    assert (found[:-1] == controlled).all()


def test_equal_lengths_stay_as_they_are() -> None:
    score = np.array([1, 2, 3, 4], np.float32)
    pool = np.array([0, 0, 1, 1], np.int32)
    assert (without_length(score, np.full(4, 7, np.float32), pool) == score).all()
    rows = pl.DataFrame({"pool": pool, "score": score})
    with pytest.raises(UserError, match="needs completion_tokens"):
        calibrate("length", rows)
