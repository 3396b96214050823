"""Completions and their scores as sorted numbers: read, joined by key, calibrated, numbered by pool.

Only key and score columns are read, so fourteen million rows take some hundred megabytes. Every completion must have a
score or a row in the scorer's ledger, every score a completion, and every key be there once.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from croco.errors import UserError
from croco.stages.pair.calibrate import calibrate, without_length
from croco.stages.pair.contrast import Contrast, Scored
from croco.stages.pair.keys import KEY, Keys, Names, Numbered, check_unique, finish, number, sorting
from croco.stages.pair.pools import groups_of
from croco.storage import shards as store

Scores = NDArray[np.float32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Shards:
    """The shards of a table: their paths, and the row at which each begins, (shards + 1,)."""

    paths: list[Path]
    edges: NDArray[np.int64]


def read_scored(
    samples: Path,
    scores: Path,
    languages: Sequence[str] | None,
    how: Contrast,
    references: Path | None = None,
    first: int | None = None,
    prompts: pl.Series | None = None,
) -> tuple[Scored, Shards]:
    """The scored completions in these languages, and the shards that hold their texts; with `references`, a folder of
    gold completions' scores, those too. `first` completions of each prompt take part, and `prompts`; None is all.

    Raises UserError for a completion without a score that the scorer's ledger does not explain, a score without its
    completion, and a key that occurs twice.
    """
    names, codes = Names(), Names()
    lengths = "completion_tokens" if how.calibration == "length" else None
    completions, shards, num_tokens = _read(samples, names, codes, lengths)
    scored, _, score = _read(scores, names, codes, "score")
    ledger = store.read_dropped(scores).filter(pl.col("unit") == "completion").select(KEY)
    numbered = [completions, scored, number(ledger, names, codes)]
    gold_score = None
    if references is not None:
        gold, _, gold_score = _read(references, names, codes, "score")
        numbered.append(gold)
    keys, scored_keys, left_out, *gold_keys = finish(names, codes, numbered)
    reference = None if gold_score is None else (gold_keys[0], gold_score)
    asked = np.ones(len(keys), np.bool_) if first is None else keys.sample < first
    value, kept = _join(keys, scored_keys, score, left_out, str(samples), str(scores), asked)
    kept = kept & asked
    if prompts is not None:
        kept = kept & keys.prompts.is_in(prompts.implode()).to_numpy()[keys.prompt]
    long = num_tokens if lengths else None
    return assemble(keys, value, languages, how, reference, kept, str(samples), long), shards


def assemble(
    keys: Keys,
    score: Scores,
    languages: Sequence[str] | None,
    how: Contrast,
    gold: tuple[Keys, Scores] | None = None,
    kept: Flags | None = None,
    table: str = "scores",
    num_tokens: Scores | None = None,
) -> Scored:
    """Sort by pool, calibrate and number the pools; rows in other languages (if any are given), or not `kept`, are out.

    `gold` are the keys and scores of gold completions; one whose pool has no completion takes no part. `num_tokens` are
    the lengths of the rows, for the calibration "length". Raises UserError for a key that occurs twice.
    """
    names, group_of = groups_of(how.pool, keys.languages)
    tuned = np.isin(keys.languages, list(keys.languages if languages is None else languages))
    part = tuned[keys.language] if kept is None else tuned[keys.language] & kept
    place = _by_pool(keys, group_of, part, table)
    mine, value, num = keys.take(place), score[place], len(place)
    pool = mine.prompt.astype(np.int64) * len(names) + group_of[mine.language]
    starts = np.flatnonzero(np.diff(pool, prepend=-1))
    known = pool[starts]
    numbers = np.repeat(np.arange(len(starts), dtype=np.int32), np.diff(starts, append=num))
    if gold is not None:
        rows = _by_pool(gold[0], group_of, tuned[gold[0].language], "gold completions")
        its_pool = gold[0].prompt[rows].astype(np.int64) * len(names) + group_of[gold[0].language[rows]]
        rows, its_pool = rows[np.isin(its_pool, known)], its_pool[np.isin(its_pool, known)]
        mine, value = mine.followed_by(gold[0].take(rows)), np.concatenate([value, gold[1][rows]])
        place = np.concatenate([place, rows])
        numbers = np.concatenate([numbers, np.searchsorted(known, its_pool).astype(np.int32)])
    counted = np.isfinite(value)
    counted[num:] = False
    in_language = mine.prompt.astype(np.int64) * len(mine.languages) + mine.language
    if how.calibration == "length":
        calibrated = without_length(value, None if num_tokens is None else num_tokens[place], numbers)
    else:
        calibrated = calibrate(how.calibration, value, mine.language, in_language, counted)
    return Scored(
        keys=mine,
        score=value,
        calibrated=calibrated,
        pool=numbers,
        place=place,
        num_completions=num,
        num_pools=len(starts),
        groups=names,
        group_of_pool=(known % len(names)).astype(np.int32),
        prompt_of_pool=(known // len(names)).astype(np.int32),
    )


def _by_pool(keys: Keys, group_of: NDArray[np.int32], part: Flags, table: str) -> NDArray[np.int64]:
    """Rows that take part, sorted by prompt, group, language and sample; raises UserError for a key there twice."""
    packed = keys.packed()
    order = sorting(packed)
    rising = packed if order is None else packed[order]
    check_unique(keys, rising, order, table)
    rows = np.flatnonzero(part) if order is None else order[part[order]]
    prompt, group = keys.prompt[rows], group_of[keys.language[rows]]
    if ((prompt[1:] == prompt[:-1]) & (group[1:] < group[:-1])).any():
        return rows[np.lexsort((group, prompt))]  # stable: languages and samples keep their order
    return rows


def _join(
    keys: Keys, scored: Keys, score: Scores, left_out: Keys, samples: str, scores: str, asked: Flags
) -> tuple[Scores, Flags]:
    """The score of every completion, and whether it has one, (R,); those that are `asked` for must be explained."""
    span = max(table.span for table in (keys, scored, left_out))
    wanted, there, explained = (table.packed(span) for table in (keys, scored, left_out))
    if len(wanted) == len(there) and (wanted == there).all():
        return score, np.ones(len(wanted), np.bool_)  # a shard of scores mirrors one of completions
    order = sorting(there)
    rising = there if order is None else there[order]
    check_unique(scored, rising, order, scores)
    at = np.minimum(np.searchsorted(rising, wanted), max(len(rising) - 1, 0))
    found = rising[at] == wanted if len(rising) else np.zeros(len(wanted), np.bool_)
    unexplained = np.flatnonzero(~found & ~np.isin(wanted, explained) & asked)
    if unexplained.size:
        raise UserError(f"{scores} holds no score for {keys.describe(int(unexplained[0]))}, expected one")
    stray = np.flatnonzero(~np.isin(there, wanted))
    if stray.size:
        raise UserError(f"{scores} scores {scored.describe(int(stray[0]))}, which {samples} does not hold")
    value = np.full(len(wanted), np.nan, np.float32)
    row = at if order is None else order[at]
    value[found] = score[row[found]]
    return value, found


def _read(
    folder: Path, prompts: Names, codes: Names, column: str | None = None
) -> tuple[Numbered, Shards, Scores]:
    """Keys of all finished shards as numbers, the shards, and a float32 column; raises UserError naming a bad file."""
    found = store.shards(folder)
    if not found:
        raise UserError(f"{folder} holds no finished shard")
    parts, values, sizes = [], [], []
    for shard in found:
        table = read_columns(shard.path, [*KEY, *([column] if column else [])])
        try:
            parts.append(number(table, prompts, codes))
        except UserError as error:
            raise UserError(f"{shard.path}: {error}") from None
        values.append(table[column].cast(pl.Float32).to_numpy() if column else np.empty(0, np.float32))
        sizes.append(table.height)
    one, two, three = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    edges = np.concatenate([[0], np.cumsum(sizes)])
    return (one, two, three), Shards([shard.path for shard in found], edges), np.concatenate(values)


def read_columns(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """Some columns of a Parquet file; raises UserError when it is missing, broken, or has no such column."""
    return pl.DataFrame(pl.from_arrow(read_arrow(path, columns)))


def read_arrow(path: Path, columns: Sequence[str]) -> pa.Table:
    """As `read_columns`, in Arrow."""
    try:
        file = pq.ParquetFile(path)
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise UserError(f"{path} has no column '{missing[0]}', expected {', '.join(columns)}")
        return file.read(columns=list(columns), use_threads=False)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from None
