"""The stage `pair`: one arm's preference pairs (or its data for SFT) from completions and their scores.

Keys and scores are read whole, as numbers. Texts pass through: each shard of completions is read once, its traits are
taken (`guards.traits`), the pools of a block are decided on traits and scores, and the picked completions are gathered
from the shards still in memory, so memory grows by some tens of bytes per completion. Pairs are written in key order,
whatever the order and shard size of what was read. It must balance: completions read = candidates + dropped, in every
language; pools read = pools with a pair + dropped."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from croco.config.arms import Contrast, Guards
from croco.errors import UserError
from croco.pipeline.arms import contrasted
from croco.pipeline.stage import Work
from croco.pipeline.status import balance
from croco.stages.pair import statistics
from croco.stages.pair.contrast import Contrasted, contrast
from croco.stages.pair.guards import TRAITS, Rows, traits
from croco.stages.pair.load_scores import read_scored
from croco.storage.lookup import ShardRows, gather, ids_in_part, locate
from croco.storage.schemas import DROPPED, PAIRS, REFERENCE, ledger

POOLS_PER_SHARD = 4096
BLOCK_ROWS = 16384  # completions whose pools are decided at once, while their texts are in memory
FAR_SHARDS = 16  # a block in more shards than these is not decided from memory: the table is not in key order
NO_GOLD = "the prompt has no gold completion"
PROMPT = ("prompt_id", "language")
READ = ("language", "completion", "completion_ids", "finish_reason", "prompt_tokens", "completion_tokens")


def pair(work: Work) -> None:
    """Write the pairs of `work.arm`; every completion and pool left out goes to the ledger with its reason."""
    settings = work.settings
    max_tokens = settings["guards"].get("max_tokens")
    guards = {name: value for name, value in settings["guards"].items() if name != "max_tokens"}
    own = {name: value for name, value in settings.items() if name in Contrast.model_fields}
    rule = Contrast(**{**own, "guards": Guards(**guards)})
    if not contrasted(rule):
        gold_data(work)
        return
    samples, prompts = work.inputs["sample"], work.inputs["prompts"]
    rows = read_scored(
        samples,
        work.inputs["score"],
        settings.get("languages"),
        rule.pool,
        rule.calibration,
        work.inputs.get("score-references"),
        first=settings.get("completions"),
        prompts=ids_in_part(prompts, settings.get("part")),
    )
    where = locate(prompts, PROMPT)
    known = sorted({*settings.get("evaluated", ()), "en"})
    texts = ShardRows(samples, READ, lambda shard: traits(shard, rule.guards, known, max_tokens))
    decide = partial(
        _decide, rule=rule, seed=settings["seed"], known=known, texts=texts, prompts=prompts, where=where
    )
    pool = rows["pool"].to_numpy()
    edges = np.append(np.flatnonzero(np.diff(pool, prepend=np.uint32(2**32 - 1))), len(pool))
    bounds = [*range(0, len(edges) - 1, POOLS_PER_SHARD), len(edges) - 1] if len(edges) > 1 else [0, 0]
    shards = list(itertools.pairwise(edges[bounds].tolist()))
    todo = work.todo(len(shards))
    with work.progress(len(shards), "shard", done=len(shards) - len(todo)) as progress:
        for index in todo:
            first, last = shards[index]
            _write(work, index, rows[first:last], decide(rows[first:last]))
            progress.advance()
    completions = rows.filter(pl.col("sample_id") != REFERENCE)
    work.record(**statistics.facts(work.folder, rule, _per_language(completions["language"])))
    statistics.warn(work.title, rule, work.record_file["facts"], work.folder)


def _decide(
    rows: pl.DataFrame,
    rule: Contrast,
    seed: int,
    known: Sequence[str],
    texts: ShardRows,
    prompts: Path,
    where: pl.DataFrame,
) -> Contrasted:
    """The pairs of the pools of one shard, block by block, with their prompts."""
    blocks = _blocks(rows, texts)
    parts = []
    for number, (first, last) in enumerate(blocks):
        block = rows[first:last]
        own = block["place"].is_not_null()
        places = block["place"].drop_nulls().to_numpy().astype(np.int64)
        texts.read_ahead(places)
        judged = texts.take(places, TRAITS)
        if number + 1 < len(blocks):
            texts.read_ahead(rows[slice(*blocks[number + 1])]["place"].drop_nulls().to_numpy())
        at = (own.cum_sum() - 1).set(~own, None)
        block = block.hstack(judged.select(pl.all().gather(at)))
        parts.append(contrast(block, rule, known, _texts_of(block, texts, prompts, where), seed))
    pairs = pl.concat([part.pairs for part in parts])
    located = pairs.select(PROMPT).join(where, on=PROMPT, how="left", maintain_order="left")
    if located["shard"].null_count():
        prompt_id, language, _ = located.filter(pl.col("shard").is_null()).row(0)
        raise UserError(
            f"{prompts} holds no prompt {prompt_id!r} in {language!r}, which a completion answers"
        )
    return Contrasted(
        pairs.with_columns(gather(prompts, located, PROMPT, ("messages",))),
        pl.concat([part.dropped for part in parts]),
        pl.concat([part.candidates for part in parts]),
    )


def _blocks(rows: pl.DataFrame, texts: ShardRows) -> list[tuple[int, int]]:
    """Where blocks of about BLOCK_ROWS rows begin and end, whole pools in each, or one block where those lie in many
    shards. Sets how many shards `texts` holds: those of a block and of the next one."""
    pool = rows["pool"].to_numpy()
    begins = np.flatnonzero(np.diff(pool, prepend=np.uint32(2**32 - 1)))
    at = np.searchsorted(begins, np.arange(BLOCK_ROWS, rows.height, BLOCK_ROWS))
    edges = sorted({0, rows.height, *begins[at[at < len(begins)]].tolist()})
    blocks = list(itertools.pairwise(edges)) or [(0, 0)]
    in_shards = [
        len(texts.shards_of(rows[slice(*block)]["place"].drop_nulls().to_numpy())) for block in blocks[:2]
    ]
    rows_per_shard = max(1, int(texts.edges[-1]) // (len(texts.edges) - 1))
    far = max(in_shards) > FAR_SHARDS + 2 * BLOCK_ROWS // rows_per_shard
    texts.held = FAR_SHARDS if far else max(2, sum(in_shards) + 1)
    return [(0, rows.height)] if far else blocks


def _texts_of(
    block: pl.DataFrame, texts: ShardRows, prompts: Path, where: pl.DataFrame
) -> Callable[[Rows, Sequence[str]], pl.DataFrame]:
    """The texts of some rows of a block; a gold completion is its prompt's reference, has no ids and ended."""

    def of(at: Rows, columns: Sequence[str]) -> pl.DataFrame:
        places = block["place"].gather(at)
        gold = places.is_null()
        if not gold.any():
            return texts.take(places.to_numpy().astype(np.int64), columns)
        drawn = texts.take(places.drop_nulls().to_numpy().astype(np.int64), columns)
        wanted = block.select(pl.col(PROMPT).gather(at).cast(pl.String)).filter(gold)
        located = wanted.join(where, on=PROMPT, how="left", maintain_order="left")
        given = gather(prompts, located, PROMPT, ("reference",)).select(
            completion="reference",
            completion_ids=pl.lit(None, pl.List(pl.Int32)),
            finish_reason=pl.lit("stop"),
        )
        order = pl.concat([gold.not_().arg_true(), gold.arg_true()]).arg_sort()
        return pl.concat([drawn, given.select(columns)]).select(pl.all().gather(order))

    return of


def _write(work: Work, index: int, rows: pl.DataFrame, made: Contrasted) -> None:
    """One shard of pairs, when its account balances in every language."""
    read = _per_language(rows.filter(pl.col("sample_id") != REFERENCE)["language"])
    candidates = _per_language(made.candidates)
    dropped = made.dropped
    balance(work.title, read, candidates, _per_language(dropped.filter(unit="completion")["language"]))
    num_pools = rows["pool"].n_unique()
    work.write(
        index,
        made.pairs.with_columns(arm=pl.lit(work.arm, pl.String)).select(PAIRS.schema.names).to_arrow(),
        read={"completion": sum(read.values()), "pool": num_pools},
        written={
            "completion": sum(candidates.values()),
            "pool": num_pools - dropped.filter(unit="pool").height,
        },
        dropped=dropped.select(DROPPED.schema.names).to_arrow(),
    )


def _per_language(languages: pl.Series) -> dict[str, int]:
    kind = languages.dtype
    counts = dict.fromkeys(kind.categories.to_list() if isinstance(kind, pl.Enum) else (), 0)
    return counts | dict(languages.value_counts().rows())


def gold_data(work: Work) -> None:
    """Data for SFT on the gold completions of the prompts: no completion of the policy and no score takes part."""
    prompts, settings = work.inputs["prompts"], work.settings
    has = (pl.col("reference").str.strip_chars() != "").fill_null(False).alias("has")
    rows = locate(prompts, PROMPT, ("reference",), lambda shard: shard.select(*PROMPT, has))
    if languages := settings.get("languages"):
        rows = rows.filter(pl.col("language").is_in(languages))
    rows = rows.sort(PROMPT)
    if (names := ids_in_part(prompts, settings.get("part"))) is not None:
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
