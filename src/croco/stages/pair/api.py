"""`croco.pairs`: the contrast on a table in memory, for anyone who has scores and wants pairs."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from pydantic import ValidationError

from croco.config.arms import Contrast
from croco.config.errors import sentence
from croco.errors import UserError
from croco.stages.pair.contrast import contrast
from croco.stages.pair.guards import Rows, traits
from croco.stages.pair.load_scores import KEY, Groups, by_pool, check_keys, enumerated

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

    `scores` is a table of Polars (lazy too), pandas, Arrow or `datasets` with a row per completion: prompt_id, language
    and score; without sample_id completions are numbered in their order, and -1 is a gold completion (for chosen =
    "reference"). With `completion` the guards judge the texts and the pairs hold them; with `messages` or `prompt`
    (text) the pairs hold their prompts, for `croco.export`. finish_reason, prompt_tokens and completion_tokens are
    judged where they are given. `guards` are values of a recipe's `[guards]`, the other arguments those of an arm.
    Selection is CroCo's (arXiv 2605.26293) by default. Raises UserError for a column that is missing or of another
    type, a null in a key, a key that is there twice, and an unknown rule."""
    given = dict(guards or {})
    max_tokens = given.pop("max_tokens", None)
    groups = pool if isinstance(pool, str) else {name: tuple(codes) for name, codes in pool.items()}
    rule = _contrast(
        {
            "pool": groups, "chosen": chosen, "rejected": rejected, "prompt": prompt, "calibration": calibration,
            "pairs_per_pool": pairs_per_pool, "guards": given,
        }
    )  # fmt: skip
    table = table_of(scores)
    for code in [languages] if isinstance(languages, str) else languages or ():
        if isinstance(languages, str) or code not in table["language"]:
            raise UserError(f"languages names '{code}', expected a list of those in the scores")
    check_keys(table)
    [keyed] = enumerated([table.select(*KEY, "score", *({"completion_tokens"} & set(table.columns)))])
    rows = by_pool(keyed, languages or None, pool, calibration)
    known = sorted({*keyed["language"].dtype.categories, "en"})  # type: ignore[attr-defined]
    made, dropped = [], []
    for part in _parts(rows):
        texts = None
        if "completion" in table.columns:
            own = table.select(
                pl.col("completion", "language", *_OPTIONAL.keys() & set(table.columns)).gather(part["place"])
            )
            own = own.with_columns(
                pl.lit(None, kind).alias(name) for name, kind in _OPTIONAL.items() if name not in own.columns
            )
            part = part.hstack(traits(own, rule.guards, known, max_tokens))
            texts = partial(_of, own)
        contrasted = contrast(part, rule, known, texts, seed)
        made.append(contrasted.pairs)
        dropped.append(contrasted.dropped)
    first = [name for name in _FIRST if name in made[0].columns]
    pairs = _with_prompts(pl.concat(made).select(*first, pl.exclude(first)), table)
    return pairs, pl.concat(dropped)


def _with_prompts(pairs: pl.DataFrame, table: pl.DataFrame) -> pl.DataFrame:
    """The pairs with the messages of their prompts, where the scores have them."""
    column = next((name for name in ("messages", "prompt") if name in table.columns), None)
    if column is None:
        return pairs
    messages = pl.col(column)
    if table[column].dtype == pl.String:
        messages = pl.concat_list(pl.struct(role=pl.lit("user"), content=messages))
    own = table.select("prompt_id", "language", messages=messages).unique(
        ("prompt_id", "language"), keep="first"
    )
    return pairs.join(own, on=("prompt_id", "language"), how="left", maintain_order="left")


def _parts(rows: pl.DataFrame) -> list[pl.DataFrame]:
    """The rows in parts of about PART_ROWS, whole pools in each; at least one part."""
    pool = rows["pool"].to_numpy()
    edges = np.searchsorted(pool, pool[::PART_ROWS]) if len(pool) else np.array([0])
    return [
        rows[int(first) : int(last)] for first, last in itertools.pairwise([*np.unique(edges), len(pool)])
    ]


def _of(texts: pl.DataFrame, at: Rows, columns: Sequence[str]) -> pl.DataFrame:
    return texts.select(pl.col([name for name in columns if name in texts.columns]).gather(at))


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
        made = values.cast(wanted)
    except pl.exceptions.PolarsError as error:
        raise UserError(f"the scores' column '{name}' holds {kind}, expected {wanted}: {error}") from None
    if made.dtype.is_integer() and (wrong := values.filter(made != values)).len():
        raise UserError(f"the scores' column '{name}' holds {wrong[0]}, expected whole numbers")
    return made


def _contrast(values: dict[str, Any]) -> Contrast:
    """The rules as a recipe has them; raises UserError for one that is unknown."""
    try:
        return Contrast.model_validate(values)
    except ValidationError as error:
        raise UserError(sentence(error, Contrast)) from None
