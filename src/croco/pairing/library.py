"""`croco.pairs`: the contrast on a table in memory, for anyone who has scores and wants pairs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from croco.errors import UserError
from croco.pairing.contrast import Contrast, Scored, contrast
from croco.pairing.guards import Guards, traits
from croco.pairing.keys import KEY, Names, finish, number
from croco.pairing.pools import Groups
from croco.pairing.rules import PROMPTS, check_groups
from croco.pairing.scored import assemble
from croco.pairing.tables import SIDES, flag_languages, flags_of, ledger_of, with_numbers

PART_ROWS = 2**20  # completions whose pools are decided at once
_FIRST = ("prompt_id", "language", "pair_id")
_OPTIONAL = {"finish_reason": pl.String, "prompt_tokens": pl.Int32, "completion_tokens": pl.Int32}


def pairs(
    scores: pl.DataFrame | pa.Table,
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

    `scores` has a row per completion with prompt_id, language, sample_id and score. With a column `completion`
    the guards judge the texts and the pairs hold them; finish_reason, prompt_tokens and completion_tokens are
    judged where they are given. `guards` are values of a recipe's `[guards]`, the other arguments those of an
    arm. The pairs have the columns of the pairs table but arm, messages and token ids; the ledger those of
    every ledger. Selection is CroCo's (arXiv 2605.26293) by default. Raises UserError for a missing column, a
    null in a key, a key that is there twice, and a rule that is unknown.
    """
    table = scores if isinstance(scores, pl.DataFrame) else pl.DataFrame(pl.from_arrow(scores))
    for column in (*KEY, "score"):
        if column not in table.columns:
            raise UserError(f"the scores have no column '{column}': found {', '.join(table.columns)}")
    if table["score"].null_count():
        raise UserError(
            f"row {(table['score'].is_null().arg_max() or 0) + 1} has no score, expected a number"
        )
    table = table.with_columns(pl.col("prompt_id", "language").cast(pl.String))
    _check(table, prompt, pairs_per_pool, guards or {}, languages)
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


def _check(
    table: pl.DataFrame,
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
    for code in [languages] if isinstance(languages, str) else languages or ():
        if isinstance(languages, str) or code not in there:
            raise UserError(f"languages names '{code}', expected a list of those in the scores")
    if "completion" in table.columns and table["completion"].null_count():
        raise UserError(
            f"row {(table['completion'].is_null().arg_max() or 0) + 1} has no completion, expected text"
        )


def _edges(scored: Scored) -> list[int]:
    """Pool numbers that bound parts of about PART_ROWS completions; at least one part."""
    at = np.arange(0, scored.num_completions, PART_ROWS)
    return [*np.unique(scored.pool[at]).tolist(), scored.num_pools] if len(at) else [0, 0]


def _of(texts: pl.Series, rows: NDArray[np.int64], wanted: NDArray[np.int64]) -> pl.Series:
    return texts.gather(rows[wanted])
