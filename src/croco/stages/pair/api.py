"""`croco.pairs`: the contrast on a table in memory, for anyone who has scores and wants pairs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from croco.config.rules import PROMPTS, check_groups
from croco.errors import UserError
from croco.stages.pair.contrast import Contrast, Scored, contrast
from croco.stages.pair.guards import Guards, traits
from croco.stages.pair.keys import KEY, Names, finish, number
from croco.stages.pair.load_scores import assemble
from croco.stages.pair.pools import Groups
from croco.stages.pair.rows import SIDES, flag_languages, flags_of, ledger_of, with_numbers

PART_ROWS = 2**20  # completions whose pools are decided at once
_FIRST = ("prompt_id", "language", "pair_id")
_OPTIONAL = {"finish_reason": pl.String, "prompt_tokens": pl.Int32, "completion_tokens": pl.Int32}
_TYPES = {
    "prompt_id": pl.String, "language": pl.String, "sample_id": pl.Int32, "score": pl.Float32, "completion": pl.String,
    **_OPTIONAL,
}  # fmt: skip


def pairs(
    scores: Any,
    chosen: str = "max",
    rejected: str = "mean-2std",
    pool: str | Groups = "language",
    *,
    prompt: str = "chosen",
    calibration: str = "none",
    pairs_per_pool: int = 1,
    guards: Mapping[str, Any] | None = None,
    languages: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Preference pairs from scored completions, and the ledger of every completion and pool that gave none.

    `scores` is a table of Polars (lazy too), pandas, Arrow or `datasets`. It has a row per completion with prompt_id,
    language and score; without sample_id the completions of a prompt are numbered in their order. With a column
    `completion` the guards judge the texts and the pairs hold them; finish_reason, prompt_tokens and
    completion_tokens are judged where they are given. `guards` are values of a recipe's `[guards]`, the other
    arguments those of an arm. The pairs have the columns of the pairs table but arm, messages and token ids; the
    ledger those of every ledger. Selection is CroCo's (arXiv 2605.26293) by default. Raises UserError for a missing
    column, a column of another type, a null in a key, a key that is there twice, and a rule that is unknown.
    """
    table = table_of(scores)
    _check(table, pool, prompt, pairs_per_pool, guards or {}, languages)
    how = Contrast(
        pool, chosen, rejected, prompt, calibration, pairs_per_pool, Guards(**(guards or {})), seed
    )
    prompts, codes = Names(), Names()
    [keys] = finish(prompts, codes, [number(table.select(KEY), prompts, codes)])
    value = table["score"].cast(pl.Float32).to_numpy()
    check_groups(pool, list(languages or keys.languages))
    num_tokens = table["completion_tokens"].cast(pl.Float32) if "completion_tokens" in table.columns else None
    lengths = None if num_tokens is None or num_tokens.null_count() else num_tokens.to_numpy()
    scored = assemble(keys, value, list(languages or keys.languages), how, num_tokens=lengths)
    among = sorted({*keys.languages, "en"})
    texts = judged = None
    if "completion" in table.columns:
        texts = table["completion"]
        absent = [
            pl.lit(None, kind).alias(name) for name, kind in _OPTIONAL.items() if name not in table.columns
        ]
        judged = table.with_columns(absent).select("completion", "language", *_OPTIONAL)
    made, left = [], []
    for first, last in itertools.pairwise(_edges(scored)):
        rows = scored.place[scored.rows(first, last)[0]]
        mine = None if judged is None else traits(judged[rows].to_arrow(), how.guards, among)
        found = contrast(scored, first, last, how, mine, None if texts is None else partial(_of, texts, rows))
        made.append(with_numbers(scored, found, how))
        left.append(ledger_of(scored, found))
    table = pl.concat(made)
    if texts is not None:
        for side in SIDES:
            picked = table[f"{side}_row"]
            places = pl.Series(scored.place[picked.to_numpy()]).set(picked < 0, None)
            table = table.with_columns(texts.gather(places).alias(side))
        table = flag_languages(table, how.guards, among)
    hidden = ("pool", "chosen_row", "rejected_row")
    return table.select(*_FIRST, pl.exclude(*_FIRST, *hidden)), pl.concat([*left, flags_of(table)])


def table_of(scores: Any) -> pl.DataFrame:
    """The columns that pairs are made of, as a Polars table with our types; raises UserError for what is not there."""
    if isinstance(scores, pl.LazyFrame):
        scores = scores.collect()
    elif hasattr(scores, "to_polars"):  # datasets.Dataset
        scores = scores.to_polars()
    try:
        table = pl.DataFrame(scores)
    except (TypeError, ValueError, pl.exceptions.PolarsError) as error:
        raise UserError(
            f"the scores are a {type(scores).__name__}, expected a table (Polars, pandas, Arrow, datasets): {error}"
        ) from None
    if "sample_id" not in table.columns and {"prompt_id", "language"} <= set(table.columns):
        table = table.with_columns(sample_id=pl.int_range(pl.len()).over("prompt_id", "language"))
    for column in (*KEY, "score"):
        if column not in table.columns:
            raise UserError(
                f"the scores have no column '{column}': found {', '.join(table.columns) or 'none'}"
            )
    for column in _TYPES.keys() & set(table.columns):
        table = table.with_columns(_cast(table[column], _TYPES[column]))
    for column in {"score", "completion"} & set(table.columns):
        if table[column].null_count():
            row = (table[column].is_null().arg_max() or 0) + 1
            raise UserError(
                f"row {row} has no {column}, expected {'a number' if column == 'score' else 'text'}"
            )
    return table


def _cast(values: pl.Series, wanted: pl.DataType | type[pl.DataType]) -> pl.Series:
    """A column in our type; raises UserError where that would change what it says."""
    kind, name = values.dtype, values.name
    text = wanted == pl.String
    fits = kind in (pl.String, pl.Categorical, pl.Enum) or (name == "prompt_id" and kind.is_integer())
    if not (fits if text else kind.is_numeric()) and kind != pl.Null:
        raise UserError(f"the scores' column '{name}' holds {kind}, expected {'text' if text else 'numbers'}")
    try:
        return values.cast(wanted)
    except pl.exceptions.PolarsError as error:
        raise UserError(f"the scores' column '{name}' holds {kind}, expected {wanted}: {error}") from None


def _check(
    table: pl.DataFrame,
    pool: str | Groups,
    prompt: str,
    pairs_per_pool: int,
    guards: Mapping[str, Any],
    languages: Sequence[str] | None,
) -> None:
    """Raise UserError for an argument that would quietly do something else."""
    if prompt not in PROMPTS:
        raise UserError(f"prompt = '{prompt}', expected one of {', '.join(PROMPTS)}")
    if pairs_per_pool < 1:
        raise UserError(f"pairs_per_pool = {pairs_per_pool}, expected at least 1")
    known = {field.name for field in fields(Guards)}
    for name, value in guards.items():
        if name not in known:
            raise UserError(f"the guard '{name}' is unknown, expected one of {', '.join(sorted(known))}")
        if isinstance(value, str) and value not in ("drop", "flag", "off"):
            raise UserError(f"the guard {name} = '{value}', expected 'drop', 'flag' or 'off'")
    there = table["language"].unique()
    check_groups(pool, there.drop_nulls().to_list())
    for code in [languages] if isinstance(languages, str) else languages or ():
        if isinstance(languages, str) or code not in there:
            raise UserError(f"languages names '{code}', expected a list of those in the scores")


def _edges(scored: Scored) -> list[int]:
    """Pool numbers that bound parts of about PART_ROWS completions; at least one part."""
    at = np.arange(0, scored.num_completions, PART_ROWS)
    return [*np.unique(scored.pool[at]).tolist(), scored.num_pools] if len(at) else [0, 0]


def _of(texts: pl.Series, rows: NDArray[np.int64], wanted: NDArray[np.int64]) -> pl.Series:
    return texts.gather(rows[wanted])
