"""Which prompts a stage takes: those in some languages, and of an arm's part of them.

Parts are dealt out in the order of prompt_id, so they differ by at most one prompt, prompts that belong together by
name are spread over all of them, and every stage that reads the prompts finds the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from croco.storage.shards import read_table


def in_part(prompts: Path, part: Sequence[int] | None) -> pl.Series | None:
    """The prompt_ids of part [number, of how many], sorted; None stands for all."""
    if part is None:
        return None
    number, count = part
    names = read_table(prompts, ["prompt_id"])["prompt_id"].unique().sort()
    return names.gather_every(count, number - 1)


def asked(
    prompts: Path, languages: Sequence[str] | None, part: Sequence[int] | None, columns: Sequence[str]
) -> pl.DataFrame:
    """Those rows of the prompts table, in the order of their keys; no languages are all of them."""
    rows = read_table(prompts, ["prompt_id", "language", *columns])
    if languages is not None:
        rows = rows.filter(pl.col("language").is_in(list(languages)))
    if (names := in_part(prompts, part)) is not None:
        rows = rows.filter(pl.col("prompt_id").is_in(names.implode()))
    return rows.sort("prompt_id", "language")
