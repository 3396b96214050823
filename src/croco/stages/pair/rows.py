"""The rows of the pairs table and of its ledger: names, texts and prompts put to the numbers of a contrast.

Texts come for the completions that were picked and for nothing else. Nothing is joined on text or on row order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from croco.errors import UserError
from croco.stages.pair.contrast import Contrast, Contrasted, Scored
from croco.stages.pair.guards import CANDIDATE, NAMES, REASONS, WRONG_LANGUAGE, Guards, wrong_language
from croco.stages.pair.texts import PICKED, Texts
from croco.storage.lookup import gather, locate
from croco.storage.schemas import PAIRS
from croco.storage.seeds import digest

SIDES = ("chosen", "rejected")
PROMPT = ("prompt_id", "language")


@dataclass(frozen=True)
class Picked:
    """Texts of the completions that were picked: their rows in `Scored`, rising, and a table of the columns PICKED."""

    rows: NDArray[np.int64]
    table: pa.Table

    @classmethod
    def of(cls, scored: Scored, found: Contrasted, texts: Texts) -> Picked:
        """The texts of a block's pairs, while their shards are in memory."""
        rows = np.unique(np.concatenate([found.pairs[side].to_numpy() for side in SIDES]))
        rows = rows[(rows >= 0) & (rows < scored.num_completions)]
        return cls(rows, texts.take(scored.place[rows]))

    @classmethod
    def joined(cls, parts: Sequence[Picked]) -> Picked:
        """Those of successive blocks as one."""
        tables = [part.table for part in parts if part.table.num_rows] or [parts[0].table]
        return cls(np.concatenate([part.rows for part in parts]), pa.concat_tables(tables))


def with_texts(
    scored: Scored, found: Contrasted, how: Contrast, picked: Picked, prompts: Path, where: pl.DataFrame
) -> pl.DataFrame:
    """The pairs in the columns of the pairs table (without `arm`); `where` says which shard holds which prompt."""
    pairs = with_numbers(scored, found, how)
    located = pairs.select("prompt_id", "language").join(where, on=PROMPT, how="left", maintain_order="left")
    if located["shard"].null_count():
        prompt_id, language, _ = located.filter(pl.col("shard").is_null()).row(0)
        raise UserError(
            f"{prompts} holds no prompt {prompt_id!r} in {language!r}, which a completion answers"
        )
    pairs = pairs.with_columns(gather(prompts, located, PROMPT, ("messages",)))
    texts = pl.DataFrame(pl.from_arrow(picked.table))
    for side in SIDES:
        pairs = pairs.with_columns(_side(scored, pairs, side, picked.rows, texts, prompts, where))
    return pairs.select(name for name in PAIRS.schema.names if name != "arm")


def with_numbers(scored: Scored, found: Contrasted, how: Contrast) -> pl.DataFrame:
    """The pairs with everything but texts: keys, scores and languages of both sides (null where there is no rejected
    one), the language of the prompt, and the rows of both sides.
    """
    keys, pairs = scored.keys, found.pairs
    columns: dict[str, pl.Series] = {}
    for side in SIDES:
        rows = pairs[side].to_numpy()
        there = pl.Series(rows >= 0)
        rows = np.where(rows >= 0, rows, 0)
        values = {
            "prompt_id": _named(keys.prompts, keys.prompt[rows]),
            "language": _named(keys.languages, keys.language[rows]),
            "sample_id": pl.Series(keys.sample[rows], dtype=pl.Int32),
            "score": pl.Series(scored.score[rows], dtype=pl.Float32),
            "calibrated": pl.Series(scored.calibrated[rows], dtype=pl.Float32),
        }
        columns |= {f"{side}_{name}": value.set(~there, None) for name, value in values.items()}
    pairs = (
        pairs.with_columns(**columns, calibration=pl.lit(how.calibration))
        .drop("rejected_prompt_id")
        .rename({"chosen_prompt_id": "prompt_id", "chosen": "chosen_row", "rejected": "rejected_row"})
    )
    return _prompted(pairs, scored, found, how)


def _named(names: pl.Series | list[str], places: NDArray[np.integer]) -> pl.Series:
    return pl.Series(names, dtype=pl.String).gather(pl.Series(places.astype(np.uint32)))


def _prompted(pairs: pl.DataFrame, scored: Scored, found: Contrasted, how: Contrast) -> pl.DataFrame:
    """The language of each pair's prompt: that of the chosen, of the rejected, of either by a seeded digest, or one row
    for each language of the pool.
    """
    if how.prompt in SIDES:
        return pairs.with_columns(language=pl.col(f"{how.prompt}_language"))
    if how.prompt == "random":
        columns = ("prompt_id", "pair_id", "chosen_language", "rejected_language")
        drawn = [
            sides[digest("prompt-language", how.seed, prompt, pair_id) % 2]
            for prompt, pair_id, *sides in pairs.select(columns).rows()
        ]
        return pairs.with_columns(language=pl.Series(drawn, dtype=pl.String))
    keys = scored.keys
    spoken = pl.DataFrame({"pool": scored.pool[found.rows], "language": keys.language[found.rows]}).unique(
        maintain_order=True
    )
    spoken = spoken.with_columns(
        pl.col("pool").cast(pl.Int64), language=_named(keys.languages, spoken["language"].to_numpy())
    )
    return pairs.join(spoken, on="pool", how="left", maintain_order="left_right")


def _side(
    scored: Scored,
    pairs: pl.DataFrame,
    side: str,
    picked: NDArray[np.int64],
    texts: pl.DataFrame,
    prompts: Path,
    where: pl.DataFrame,
) -> pl.DataFrame:
    """Text, ids and finish reason of one side; a gold completion has no ids and ended by itself."""
    rows = pairs[f"{side}_row"].to_numpy()
    drawn = (rows >= 0) & (rows < scored.num_completions)
    at = pl.Series(np.searchsorted(picked, rows)).set(pl.Series(~drawn), None)
    found = {name: texts[name].gather(at) for name in PICKED}
    gold = np.flatnonzero(rows >= scored.num_completions)
    if len(gold):
        wanted = pairs[gold].select("prompt_id", pl.col(f"{side}_language").alias("language"))
        located = wanted.join(where, on=PROMPT, how="left", maintain_order="left")
        reference = gather(prompts, located, PROMPT, ("reference",))["reference"]
        found["completion"] = found["completion"].scatter(gold, reference)
        found["finish_reason"] = found["finish_reason"].scatter(gold, "stop")
    names = {"completion": side, "completion_ids": f"{side}_ids", "finish_reason": f"{side}_finish_reason"}
    return pl.DataFrame({name: found[column] for column, name in names.items()})


def ledger_of(scored: Scored, found: Contrasted) -> pl.DataFrame:
    """What a block left out: completions that are no candidates, pairs that a guard dropped, pools without a pair."""
    keys, dropped = scored.keys, found.verdicts.dropped
    out = np.flatnonzero(dropped != CANDIDATE)
    reasons = pl.Series([REASONS[name] for name in NAMES])
    refused = found.refused["chosen"].to_numpy()
    left = found.left["pool"].to_numpy()
    return pl.concat(
        [
            _rows(
                "completion",
                scored,
                found.rows[out],
                reasons.gather(pl.Series(dropped[out].astype(np.uint32))),
            ),
            _rows("pair", scored, refused, found.refused["reason"]),
            pl.DataFrame(
                {
                    "unit": pl.repeat("pool", len(left), eager=True),
                    "prompt_id": _named(keys.prompts, scored.prompt_of_pool[left]),
                    "language": _named(scored.groups, scored.group_of_pool[left]),
                    "sample_id": pl.repeat(None, len(left), dtype=pl.Int32, eager=True),
                    "reason": found.left["reason"],
                }
            ),
        ]
    )


def flag_languages(table: pl.DataFrame, guards: Guards, among: Sequence[str]) -> pl.DataFrame:
    """The pairs with a flag for each side that is in another language than it should be, if the guard flags."""
    if guards.wrong_language != "flag":
        return table
    marks: list[list[str]] = []
    for row in table.select(
        "flags", *(f"{side}{part}" for side in SIDES for part in ("", "_language"))
    ).iter_rows():
        sides = zip(SIDES, (row[1:3], row[3:5]), strict=True)
        wrong = [
            f"{side}: {WRONG_LANGUAGE}"
            for side, (text, language) in sides
            if text is not None and wrong_language(text, language, among, guards.min_letters) is not None
        ]
        marks.append([*row[0], *wrong])
    return table.with_columns(pl.Series("flags", marks, dtype=pl.List(pl.String)))


def _rows(unit: str, scored: Scored, rows: NDArray[np.int64], reasons: pl.Series) -> pl.DataFrame:
    keys = scored.keys
    return pl.DataFrame(
        {
            "unit": pl.repeat(unit, len(rows), eager=True),
            "prompt_id": _named(keys.prompts, keys.prompt[rows]),
            "language": _named(keys.languages, keys.language[rows]),
            "sample_id": pl.Series(keys.sample[rows], dtype=pl.Int32),
            "reason": reasons,
        }
    )


def flags_of(table: pl.DataFrame) -> pl.DataFrame:
    """A ledger row per flag of a pair, under the completion it is about; nothing was left out: the unit is "flag"."""
    flags = (
        table.explode("flags")
        .drop_nulls("flags")
        .with_columns(
            side=pl.when(pl.col("flags").str.starts_with("rejected: "))
            .then(pl.lit("rejected"))
            .otherwise(pl.lit("chosen"))
        )
    )
    of_side = {
        name: pl.when(pl.col("side") == "rejected")
        .then(pl.col(f"rejected_{name}"))
        .otherwise(pl.col(f"chosen_{name}"))
        for name in ("language", "sample_id")
    }
    found = flags.select(pl.lit("flag").alias("unit"), "prompt_id", **of_side, reason=pl.col("flags"))
    return found.unique(maintain_order=True)


def gold_characters(scored: Scored, prompts: Path) -> NDArray[np.int32]:
    """The length of each gold completion of `scored`, (F,)."""
    keys, gold = scored.keys, slice(scored.num_completions, None)
    if scored.num_completions == len(keys):
        return np.empty(0, np.int32)
    length = pl.col("reference").str.len_chars().cast(pl.Int32).alias("length")
    known = locate(prompts, PROMPT, ("reference",), lambda rows: rows.select(*PROMPT, length))
    wanted = pl.DataFrame(
        {
            "prompt_id": _named(keys.prompts, keys.prompt[gold]),
            "language": _named(keys.languages, keys.language[gold]),
        }
    )
    found = wanted.join(known, on=PROMPT, how="left", maintain_order="left")
    return found["length"].fill_null(0).to_numpy()
