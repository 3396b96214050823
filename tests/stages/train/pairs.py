"""Pairs for the tests: random words, several languages, completions of spread lengths."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import BaseModel

from croco.storage.schemas import TABLES
from croco.storage.shards import write_shard

WORDS = (
    "March",
    "April",
    "maj",
    "juin",
    "comes",
    "after",
    "Which",
    "month",
    "efter",
    "kommer",
    "quel",
    "vient",
)
LANGUAGES = ("en", "da", "fr")


def replace(record: Any, **values: Any) -> Any:
    """A copy of a frozen record with other values, which are not checked."""
    if isinstance(record, BaseModel):
        return record.model_copy(update=values)
    return dataclasses.replace(record, **values)


def make_pairs(num_pairs: int, seed: int = 0, longest: int = 9) -> pl.DataFrame:
    """A table with the columns training reads; prompts repeat over languages."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))

    rows = [
        {
            "prompt_id": f"p{i // len(LANGUAGES)}",
            "language": LANGUAGES[i % len(LANGUAGES)],
            "messages": [{"role": "user", "content": text(2, 10)}],
            "chosen": text(1, longest),
            "rejected": text(1, longest) + " x",
        }
        for i in range(num_pairs)
    ]
    return pl.DataFrame(rows)


def write_pairs(folder: Path, pairs: pl.DataFrame) -> None:
    """The pairs as a finished table of an arm "mono"; what training does not read has some value."""
    num_pairs = pairs.height
    full = pairs.with_columns(
        chosen_ids=pl.Series([None] * num_pairs, dtype=pl.List(pl.Int32)),
        rejected_ids=pl.Series([None] * num_pairs, dtype=pl.List(pl.Int32)),
        **{name: pl.lit(0) for name in ("chosen_sample_id", "rejected_sample_id", "pool_size")},
        **{name: pl.lit(0.0) for name in ("chosen_score", "rejected_score", "pool_mean", "pool_std")},
        **{name: pl.col("language") for name in ("chosen_language", "rejected_language")},
        **{name: pl.lit("stop") for name in ("chosen_finish_reason", "rejected_finish_reason")},
        arm=pl.lit("mono"),
        pair_id=pl.lit(0),
        calibration=pl.lit("none"),
        flags=pl.lit([], pl.List(pl.String)),
        **{
            name: pl.lit(None, pl.Float32)
            for name in ("chosen_calibrated", "rejected_calibrated", "pool_min")
        },
    )
    table = full.select(TABLES["pairs"].schema.names).to_arrow()
    count = {"pair": num_pairs}
    write_shard(folder, 0, table, TABLES["pairs"].schema, read=count, written=count, dropped=None)
