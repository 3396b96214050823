"""Guards: which completions may not become candidates, and why.

A completion that was cut at the token limit has no end to learn from, an empty one teaches nothing, a
repeated one would weigh twice, and a score that is no number poisons every mean it enters. None of them is a
candidate, so none enters a pool's mean or std; each is in the ledger with its reason. Guards look at one
completion and its siblings in the same language; anything that compares chosen with rejected belongs to
selection.
"""

from __future__ import annotations

import polars as pl

from croco.pairing.pools import KEY

NOT_FINITE = "score is not finite"
EMPTY = "completion is empty"
CUT = "cut at the token limit"
DUPLICATE = "duplicate of an earlier completion"


def traits(completions: pl.DataFrame) -> pl.DataFrame:
    """What the guards need of each completion, without its text: key, empty, cut, and a 64-bit hash of the
    text.

    Texts are compared by hash so that they can leave memory shard by shard; within one prompt and language
    two different texts share a hash about once in 10^19 comparisons.
    """
    return completions.select(
        *KEY,
        (pl.col("completion").str.strip_chars() == "").alias("empty"),
        (pl.col("finish_reason") == "length").alias("cut"),
        pl.col("completion").hash().alias("text_hash"),
    )


def reasons(rows: pl.DataFrame) -> pl.DataFrame:
    """Add the column `reason` to rows of `traits` with a score, sorted by key; null marks a candidate.

    A completion has one reason, the first that applies in the order not finite, empty, cut, duplicate; only
    completions that pass the others can make a later one a duplicate.
    """
    judged = rows.with_columns(
        pl.when(~pl.col("score").is_finite())
        .then(pl.lit(NOT_FINITE))
        .when(pl.col("empty"))
        .then(pl.lit(EMPTY))
        .when(pl.col("cut"))
        .then(pl.lit(CUT))
        .alias("reason")
    )
    sound = judged["reason"].is_null()
    first = (
        judged.filter(sound)
        .select(pl.struct("prompt_id", "language", "text_hash").is_first_distinct())
        .to_series()
    )
    repeated = pl.zeros(judged.height, dtype=pl.Boolean, eager=True)
    repeated = repeated.scatter(sound.arg_true(), ~first)
    return judged.with_columns(
        pl.when(repeated).then(pl.lit(DUPLICATE)).otherwise(pl.col("reason")).alias("reason")
    )
