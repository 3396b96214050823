"""Completions and their scores as one table of numbers: read, joined by key, calibrated, sorted by pool.

Only keys and scores are read, so fourteen million rows take some hundred megabytes. Names are Enums in sorted order, so
sorting numbers sorts names. Every completion must have a score or a row in the scorer's ledger, every score a
completion."""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np
import polars as pl

from croco.config.rules import check_groups
from croco.errors import UserError
from croco.stages.pair.calibrate import calibrate
from croco.storage import shards
from croco.storage.schemas import REFERENCE

KEY = ("prompt_id", "language", "sample_id")
LEAST_RUN = 8  # rows of one name, on average, from which it pays to look at runs instead of rows
Groups = Mapping[str, Sequence[str]]


def read_scored(
    samples: Path,
    scores: Path,
    languages: Sequence[str] | None,
    pool: str | Groups,
    calibration: str = "none",
    references: Path | None = None,
    first: int | None = None,
    prompts: pl.Series | None = None,
) -> pl.DataFrame:
    """The scored completions in these languages (None: all) as of `by_pool`, with gold completions of the folder
    `references`; `first` completions of each prompt take part, and `prompts`. Raises UserError for a completion without
    a score that the ledger does not explain, a score without its completion, and a key that occurs twice."""
    names = pl.Categorical(pl.Categories.random())  # until all names are known
    completions = _read(samples, names, ["completion_tokens"] if calibration == "length" else [])
    tables = [completions, _read(scores, names, ["score"])]
    left_out = shards.read_dropped(scores).filter(unit="completion").select(KEY)
    tables.append(left_out.with_columns(pl.col("prompt_id", "language").cast(names)))
    if references is not None:
        tables.append(_read(references, names, ["score"]))
    completions, scored, left_out, *gold = enumerated(tables)
    asked = pl.lit(True) if first is None else pl.col("sample_id") < first
    table = _joined(completions, scored, left_out, asked, str(samples), str(scores))
    table = table.filter(asked)
    if prompts is not None:
        table = table.filter(pl.col("prompt_id").cast(pl.String).is_in(prompts.implode()))
    return by_pool(table, languages, pool, calibration, gold[0] if gold else None, str(samples))


def _read(folder: Path, names: pl.Categorical, columns: Sequence[str]) -> pl.DataFrame:
    """Keys and some columns of all finished shards; raises UserError naming a bad file."""
    parts = []
    for shard in shards.shards(folder):
        part = shards.read_parquet(shard.path, [*KEY, *columns])
        try:
            check_keys(part)
        except UserError as error:
            raise UserError(f"{shard.path}: {error}") from None
        parts.append(part.with_columns(pl.col("prompt_id", "language").cast(names)))
    if not parts:
        raise UserError(f"{folder} holds no finished shard")
    return pl.concat(parts)


def check_keys(table: pl.DataFrame) -> None:
    """Raise UserError for a null in a key and a sample_id below that of a gold completion."""
    for column in KEY:
        if table[column].null_count():
            row = (table[column].is_null().arg_max() or 0) + 1
            raise UserError(f"row {row} has no {column}, expected one")
    lowest = int(table["sample_id"].to_numpy().min(initial=0))
    if lowest < REFERENCE:
        raise UserError(f"found sample_id {lowest}, expected the number of a sample, from 0 on")


def enumerated(tables: Sequence[pl.DataFrame]) -> list[pl.DataFrame]:
    """The tables with prompt_id and language as Enums of all names in sorted order."""
    for column in ("prompt_id", "language"):
        runs = [_runs(table[column]) for table in tables]
        names = pl.concat([heads.unique() for heads, _ in runs]).unique().cast(pl.String)
        kind = pl.Enum(names.sort())
        made = [
            heads.cast(kind) if place is None else heads.cast(kind).gather(place) for heads, place in runs
        ]
        tables = [table.with_columns(values) for table, values in zip(tables, made, strict=True)]
    return list(tables)


def _runs(values: pl.Series) -> tuple[pl.Series, pl.Series | None]:
    """The first value of each run of equal ones and the run of each row; where runs are short, all values and None."""
    run = values.rle_id()
    if values.is_empty() or run[-1] > len(values) // LEAST_RUN:
        return values, None
    return values.gather(np.flatnonzero(np.diff(run.to_numpy(), prepend=np.uint32(2**32 - 1)))), run


def by_pool(
    table: pl.DataFrame,
    languages: Sequence[str] | None,
    pool: str | Groups,
    calibration: str = "none",
    gold: pl.DataFrame | None = None,
    name: str = "scores",
) -> pl.DataFrame:
    """Completions sorted by pool, then language and sample, in these languages.

    `table` has KEY, score and, for "length", completion_tokens; `gold` KEY and score. Columns: `pool` (from 0), `group`
    (its languages, by name), KEY, `score`, `calibrated`, `place` (the row of `table`; null for a gold completion). A
    gold completion whose pool has no other takes no part. Raises UserError for a key that occurs twice."""
    if "place" not in table.columns:
        table = table.with_row_index("place")
    groups = _groups(pool, table["language"].dtype.categories.to_list())  # type: ignore[attr-defined]
    rows = _sorted(table, groups, name, languages)
    heads = np.zeros(rows.height, np.bool_)
    for column in ("prompt_id", "group"):
        numbers = rows[column].to_physical().to_numpy()
        heads[1:] |= numbers[1:] != numbers[:-1]
    rows = rows.with_columns(pool=pl.Series(np.cumsum(heads, dtype=np.uint32)))
    if gold is not None:
        golden = _sorted(
            gold.with_columns(place=pl.lit(None, pl.UInt32)), groups, "gold completions", languages
        )
        pools = rows.select("prompt_id", "group", "pool").unique()
        golden = golden.join(pools, on=("prompt_id", "group"), how="inner")
        rows = pl.concat([rows, golden.select(rows.columns)]).sort("pool", "language", "sample_id")
    return rows.with_columns(calibrated=pl.Series(calibrate(calibration, rows))).select(
        "pool", "group", *KEY, "score", "calibrated", "place"
    )


def _groups(pool: str | Groups, languages: Sequence[str]) -> pl.Series:
    """The group of each language: an Enum in the order of the groups' first languages."""
    owner = check_groups(pool, languages)
    named = {code: "all" if pool == "all" else owner.get(code, code) for code in languages}
    return pl.Series(list(named.values()), dtype=pl.Enum(list(dict.fromkeys(named.values()))))


def _sorted(
    table: pl.DataFrame, groups: pl.Series, name: str, languages: Sequence[str] | None
) -> pl.DataFrame:
    """By prompt, group, language and sample, those in the languages; raises UserError for a key that is there twice."""
    rows = table.with_columns(group=groups.gather(table["language"].to_physical()))
    order = ("prompt_id", "group", "language", "sample_id")
    spans = [_span(rows[column]) for column in order]
    if prod(spans) >= 2**63:
        raise UserError(f"{name}: sample_id {spans[-1] - 2} is too large, expected the number of a sample")
    packed = np.zeros(rows.height, np.int64)  # one number per key, in the order of the keys
    for column, span in zip(order, spans, strict=True):
        packed *= span
        packed += rows[column].to_physical().to_numpy()
    if (packed[1:] <= packed[:-1]).any():
        by_key = np.argsort(packed, kind="stable")
        rows, packed = rows[by_key], packed[by_key]
        twice = np.flatnonzero(packed[1:] == packed[:-1])
        if len(twice):
            raise UserError(
                f"{name}: {described(rows, int(twice[0]))} occurs more than once, expected every key once"
            )
    if languages is None or set(languages) >= set(rows["language"].unique()):
        return rows
    return rows.filter(pl.col("language").cast(pl.String).is_in(list(languages)))


def _span(values: pl.Series) -> int:
    """How many numbers a column of a key may have, and that of a gold completion."""
    kind = values.dtype
    return len(kind.categories) if isinstance(kind, pl.Enum) else int(values.to_numpy().max(initial=0)) + 2


def described(rows: pl.DataFrame, row: int) -> str:
    """A key as error messages write it."""
    prompt, language, sample = rows.select(KEY).row(row)
    return f"prompt_id {prompt!r}, language {language!r}, sample_id {sample}"


def _joined(
    completions: pl.DataFrame,
    scored: pl.DataFrame,
    left_out: pl.DataFrame,
    asked: pl.Expr,
    samples: str,
    scores: str,
) -> pl.DataFrame:
    """The completions that have a score, with it and their `place`; those that are `asked` for must be explained."""
    completions = completions.with_row_index("place")
    if completions.select(KEY).equals(scored.select(KEY)):
        return completions.with_columns(scored["score"])  # a shard of scores mirrors one of completions
    if scored.select(pl.struct(KEY).is_duplicated().any()).item():
        row = scored.select(pl.struct(KEY).is_duplicated().arg_max()).item()
        raise UserError(f"{scores}: {described(scored, row)} occurs more than once, expected every key once")
    unexplained = completions.filter(asked).join(
        pl.concat([scored.select(KEY), left_out.select(KEY)]), on=KEY, how="anti", maintain_order="left"
    )
    if unexplained.height:
        raise UserError(f"{scores} holds no score for {described(unexplained, 0)}, expected one")
    stray = scored.join(completions, on=KEY, how="anti", maintain_order="left")
    if stray.height:
        raise UserError(f"{scores} scores {described(stray, 0)}, which {samples} does not hold")
    return completions.join(scored, on=KEY, how="inner", maintain_order="left")
