"""The stage `pair`: one arm's preference pairs (or its data for SFT) from completions and their scores.

Keys and scores are read whole, as numbers; texts pass through, some shards at a time: each shard is read once,
judged by the guards, its pools are decided, and the few completions that were picked are taken from it. So
memory grows by some tens of bytes per completion and never with their text. Pairs are written in key order,
whatever the order and the shard size of what was read; where a table's rows are not in key order its shards are
read more than once.

Accounts that must balance: completions read = candidates + dropped, in every language; pools read = pools with
a pair + dropped. A completion that the scorer left out stands in the scorer's ledger and is not read here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
from numpy.typing import NDArray

from croco.pipeline.stage import Work
from croco.pipeline.status import balance
from croco.stages.pair import statistics
from croco.stages.pair.contrast import Contrast, Contrasted, Scored, contrast
from croco.stages.pair.guards import CANDIDATE, Guards
from croco.stages.pair.keys import REFERENCE
from croco.stages.pair.load_scores import Shards, read_scored
from croco.stages.pair.rows import (
    PROMPT,
    Picked,
    flag_languages,
    flags_of,
    gold_characters,
    ledger_of,
    with_texts,
)
from croco.stages.pair.texts import Texts
from croco.stages.prompts.part import in_part
from croco.storage.lookup import gather, locate
from croco.storage.schemas import DROPPED, PAIRS, ledger

POOLS_PER_SHARD = 4096
BLOCK_ROWS = 16384  # completions whose pools are decided at once, while their texts are in memory
FAR_SHARDS = (
    16  # a block spread over more shards than this is not decided from memory: the table is not in key order
)
NO_GOLD = "the prompt has no gold completion"


def pair(work: Work) -> None:
    """Write the pairs of `work.arm`; every completion and pool left out goes to the ledger with its reason."""
    how = contrast_of(work)
    if how.chosen == "reference" and how.rejected == "none":
        gold_data(work)
        return
    samples, prompts = work.inputs["sample"], work.inputs["prompts"]
    scored, shards = read_scored(
        samples,
        work.inputs["score"],
        work.settings.get("languages"),
        how,
        work.inputs.get("score-references"),
        first=work.settings.get("completions"),
        prompts=in_part(prompts, work.settings.get("part")),
    )
    among = sorted({*_prompt_languages(work), *work.settings["held_out_languages"], "en"})
    texts = Texts(shards, how.guards, among, held=_held(shards))
    where = locate(prompts, PROMPT)
    lengths = gold_characters(scored, prompts)
    num_shards = max(1, -(-scored.num_pools // POOLS_PER_SHARD))
    todo = work.todo(num_shards)
    with work.progress(num_shards, "shard", done=num_shards - len(todo)) as progress:
        for index in todo:
            first, last = index * POOLS_PER_SHARD, min((index + 1) * POOLS_PER_SHARD, scored.num_pools)
            here = _prompts_of(scored, where, first, last)
            parts, picked = [], []
            for part in _decided(scored, shards, first, last, how, texts, lengths):
                parts.append(part)
                picked.append(Picked.of(scored, part, texts))
            found = Contrasted.joined(parts)
            table = with_texts(scored, found, how, Picked.joined(picked), prompts, here)
            table = flag_languages(table, how.guards, among)
            dropped = pl.concat([ledger_of(scored, found), flags_of(table)])
            candidates = _per_language(scored, found.rows[found.verdicts.dropped == CANDIDATE])
            _write(work, index, scored, (first, last), table, dropped, candidates)
            texts.forget()
            progress.advance()
    work.record(
        **statistics.facts(work.folder, how, _per_language(scored, np.arange(scored.num_completions)))
    )
    statistics.warn(work.title, how, work.record_file["facts"])


def _prompt_languages(work: Work) -> list[str]:
    return locate(work.inputs["prompts"], PROMPT)["language"].unique().sort().to_list()


def _prompts_of(scored: Scored, where: pl.DataFrame, first: int, last: int) -> pl.DataFrame:
    """The rows of `where` that pools from `first` up to `last` can ask for."""
    names = scored.keys.prompts.gather(
        pl.Series(np.unique(scored.prompt_of_pool[first:last]).astype(np.uint32))
    )
    return where.join(names.to_frame("prompt_id"), on="prompt_id", how="semi")


def contrast_of(work: Work) -> Contrast:
    """The arm's contrast from the settings that entered the fingerprint."""
    settings = work.settings
    names = ("pool", "chosen", "rejected", "prompt", "calibration", "pairs_per_pool")
    return Contrast(
        **{name: settings[name] for name in names}, guards=Guards(**settings["guards"]), seed=settings["seed"]
    )


def _write(
    work: Work,
    index: int,
    scored: Scored,
    pools: tuple[int, int],
    table: pl.DataFrame,
    dropped: pl.DataFrame,
    candidates: Mapping[str, int],
) -> None:
    """One shard of pairs, when its account balances in every language."""
    read = _per_language(scored, scored.rows(*pools)[0])
    lost = dict(dropped.filter(pl.col("unit") == "completion").group_by("language").len().rows())
    balance(work.title, read, candidates, lost)
    num_pools = pools[1] - pools[0]
    work.write(
        index,
        table.with_columns(arm=pl.lit(work.arm, pl.String)).to_arrow(),
        read={"completion": sum(read.values()), "pool": num_pools},
        written={
            "completion": sum(candidates.values()),
            "pool": num_pools - dropped.filter(pl.col("unit") == "pool").height,
        },
        dropped=dropped.select(DROPPED.schema.names).to_arrow(),
    )


def _per_language(scored: Scored, rows: NDArray[np.int64]) -> dict[str, int]:
    """How many of the rows are in each language."""
    return dict(
        zip(
            scored.keys.languages,
            np.bincount(scored.keys.language[rows], minlength=len(scored.keys.languages)).tolist(),
            strict=True,
        )
    )


def gold_data(work: Work) -> None:
    """Data for SFT on the gold completions of the prompts: no completion of the policy and no score takes part."""
    prompts = work.inputs["prompts"]
    languages = work.settings.get("languages") or _prompt_languages(work)
    has = (pl.col("reference").str.strip_chars() != "").fill_null(False).alias("has")
    rows = locate(prompts, PROMPT, ("reference",), lambda found: found.select(*PROMPT, has))
    rows = rows.filter(pl.col("language").is_in(languages)).sort(PROMPT)
    if (names := in_part(prompts, work.settings.get("part"))) is not None:
        rows = rows.filter(pl.col("prompt_id").is_in(names.implode()))
    num_shards = max(1, -(-rows.height // POOLS_PER_SHARD))
    for index in work.todo(num_shards):
        part = rows.slice(index * POOLS_PER_SHARD, POOLS_PER_SHARD)
        kept = part.filter("has")
        texts = gather(prompts, kept, PROMPT, ("messages", "reference"))
        given = {
            "arm": work.arm, "pair_id": 0, "chosen_finish_reason": "stop", "calibration": "none",
            "chosen_sample_id": REFERENCE, "pool_size": 0,
        }  # fmt: skip
        table = kept.select(*PROMPT).with_columns(
            pl.col("language").alias("chosen_language"),
            messages=texts["messages"],
            chosen=texts["reference"],
            flags=pl.lit([], pl.List(pl.String)),
            **{name: pl.lit(value) for name, value in given.items()},
        )
        absent = set(PAIRS.schema.names) - set(table.columns)
        table = table.with_columns(pl.lit(None).alias(name) for name in absent).select(PAIRS.schema.names)
        left = part.filter(~pl.col("has")).select(*PROMPT).rows()
        dropped = ledger([("pool", *key, None, NO_GOLD) for key in left])
        read, written = {"pool": part.height}, {"pool": kept.height}
        work.write(index, table.to_arrow(), read=read, written=written, dropped=dropped)
    work.record(pools=rows.height, pairs=rows.filter("has").height)


def _held(shards: Shards) -> int:
    """Shards in memory: those of the block at hand and of the one that is read ahead."""
    rows_per_shard = max(1, int(shards.edges[-1]) // len(shards.paths))
    return 2 * min(-(-BLOCK_ROWS // rows_per_shard) + 1, FAR_SHARDS)


def _decided(
    scored: Scored,
    shards: Shards,
    first: int,
    last: int,
    how: Contrast,
    texts: Texts,
    gold_characters: NDArray[np.int32],
) -> Iterator[Contrasted]:
    """The pools from `first` up to `last`, decided block by block; at least one block."""
    edges = blocks(scored, shards, first, last)
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        rows, gold = scored.rows(start, stop)
        places = scored.place[rows]
        texts.read_ahead(places)
        traits = texts.traits(places)
        if len(gold):
            length = gold_characters[gold - scored.num_completions]
            traits = replace(traits, characters=np.concatenate([traits.characters, length]))
        if number + 2 < len(edges):
            texts.read_ahead(scored.place[scored.rows(stop, edges[number + 2])[0]])
        yield contrast(scored, start, stop, how, traits, partial(_completions, texts, places))


def _completions(texts: Texts, places: NDArray[np.int64], wanted: NDArray[np.int64]) -> pl.Series:
    return texts.completions(places[wanted])


def blocks(scored: Scored, shards: Shards, first: int, last: int) -> list[int]:
    """Pool numbers that bound blocks of about BLOCK_ROWS completions, or the whole stretch where the rows of a
    block lie in many shards.
    """
    begins = np.searchsorted(
        scored.pool[: scored.num_completions], np.arange(first, last + 1, dtype=np.int32)
    )
    total = int(begins[-1] - begins[0])
    inner = np.searchsorted(begins - begins[0], np.arange(BLOCK_ROWS, total, BLOCK_ROWS))
    edges = sorted({first, last, *(first + inner).tolist()}) if last > first else [first, last]
    rows = scored.place[begins[0] : begins[min(edges[1] - first, last - first)]]
    spread = len(np.unique(np.searchsorted(shards.edges, rows, side="right")))
    rows_per_shard = max(1, int(shards.edges[-1]) // len(shards.paths))
    return [first, last] if spread > FAR_SHARDS + 2 * len(rows) // rows_per_shard else edges
