"""The stage `pair`: one arm's preference pairs from completions and their scores.

Two passes. The first reads keys, scores and what the guards need of each completion, and forgets the text;
pools and selection happen on numbers. The second opens only the shards that hold the few completions of each
block of pairs, so memory grows by some bytes per completion and never with their text. Pairs are written in
key order, whatever the order and the shard size of what was read.

Accounts that must balance: completions read = candidates + dropped, pools read = pairs + dropped. A
completion that the scorer left out stands in the scorer's ledger and is not read here; one with neither score
nor ledger row is an error, and so is a score without its completion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray
from rich.console import Console

from croco.errors import UserError
from croco.pairing.gather import gather, locate
from croco.pairing.guards import reasons, traits
from croco.pairing.pools import KEY, Pools, build_pools, describe_key, pool_key, sort_by_key
from croco.pairing.select import NO_ROW, Selection, parse_rule, select, share_other_than_minimum
from croco.records import DROPPED
from croco.sampling.seeds import digest
from croco.stage import Work
from croco.standing import balance
from croco.store import read_dropped, read_table

POOLS_PER_SHARD = 8192
SIDES = ("chosen", "rejected")
SMALL_SHARE = 0.2  # under this the rule is the minimum under another name
NO_CANDIDATE = "no candidate left in the pool"
ONE_CANDIDATE = "only one candidate in the pool"
NONE_BELOW = "no candidate scores below the chosen one"


@dataclass(frozen=True)
class Contrast:
    """How an arm chooses: the pool, the two rules, whose language the prompt is in, and the seed of a random
    choice.
    """

    pool: str
    chosen: str
    rejected: str
    prompt: str = "chosen"
    seed: int = 0


@dataclass(frozen=True)
class Paired:
    """The outcome of selection: every completion with its pool's number and the reason it is no candidate (or
    null), the pools of candidates, and the row picked for each. Pools are numbered in key order, those
    without candidates too.
    """

    rows: pl.DataFrame
    pools: Pools
    selection: Selection
    num_pools: int

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The number of each pool of candidates."""
        return self.pools.rows["pool"].to_numpy()[self.pools.starts]


def pair(work: Work) -> None:
    """Write the pairs of `work.arm`; every completion and pool left out goes to the ledger with its
    reason.
    """
    arm = work.recipe.arms[str(work.arm)]
    contrast = Contrast(arm.pool, arm.chosen, arm.rejected, arm.prompt, work.seed)
    samples, prompts = work.inputs["sample"], work.inputs["prompts"]
    scored = read_scored(samples, work.inputs["score"], work.recipe.run.languages)
    paired = choose(scored, contrast)
    _account(work, paired, contrast)
    where = locate(prompts, ("prompt_id", "language"))
    num_shards = max(1, -(-paired.num_pools // POOLS_PER_SHARD))
    todo = work.todo(num_shards)
    with work.progress(num_shards, "shard", done=num_shards - len(todo)) as progress:
        for index in todo:
            first, last = index * POOLS_PER_SHARD, min((index + 1) * POOLS_PER_SHARD, paired.num_pools)
            picked = picks(paired, contrast, first, last)
            table = with_texts(picked, samples, prompts, where).with_columns(arm=pl.lit(work.arm, pl.String))
            dropped = ledger_of(paired, first, last)
            work.write(index, table.to_arrow(), read={"pool": last - first}, dropped=dropped)
            progress.advance()


def read_scored(samples: Path, scores: Path, languages: Sequence[str]) -> pl.DataFrame:
    """Every scored completion in these languages, sorted by key: its score, what the guards need, and its
    shard.

    Raises UserError for a completion without a score that the scorer's ledger does not explain, a score
    without its completion, and a key that occurs twice.
    """
    completions = locate(samples, KEY, ("completion", "finish_reason"), traits)
    completions, _, _ = sort_by_key(completions, f"completions in {samples}")
    found, _, _ = sort_by_key(read_table(scores, [*KEY, "score"]), f"scores in {scores}")
    left_out = read_dropped(scores).filter(pl.col("unit") == "completion").select(KEY)
    unscored = completions.join(found, on=KEY, how="anti").join(left_out, on=KEY, how="anti")
    if unscored.height:
        raise UserError(
            f"{scores} holds no score for {describe_key(unscored.row(0, named=True))}; expected one."
        )
    stray = found.join(completions, on=KEY, how="anti")
    if stray.height:
        raise UserError(
            f"{scores} scores {describe_key(stray.row(0, named=True))}, which {samples} does not hold."
        )
    joined = completions.join(found, on=KEY, how="inner", maintain_order="left")
    return joined.filter(pl.col("language").is_in(list(languages)))


def choose(scored: pl.DataFrame, contrast: Contrast) -> Paired:
    """Guard, pool and select; `scored` as `read_scored` gives it."""
    rows, new_prompt, new_language = sort_by_key(reasons(scored), "completions")
    number = np.cumsum(new_language if "language" in pool_key(contrast.pool) else new_prompt) - 1
    rows = rows.with_columns(pool=pl.Series(number, dtype=pl.Int64))
    candidates = rows.filter(pl.col("reason").is_null()).select(*KEY, "score", "shard", "pool")
    pools = build_pools(candidates, contrast.pool)
    selection = select(pools, parse_rule(contrast.chosen), parse_rule(contrast.rejected))
    return Paired(rows, pools, selection, int(number[-1]) + 1 if len(number) else 0)


def picks(paired: Paired, contrast: Contrast, first: int, last: int) -> pl.DataFrame:
    """The pairs of the pools numbered from `first` up to `last`, in that order, without their texts."""
    pools, selection, numbers = paired.pools, paired.selection, paired.numbers
    here = np.flatnonzero((numbers >= first) & (numbers < last) & (selection.rejected != NO_ROW))
    sides = {
        side: pools.rows[rows[here]].select(pl.all().name.prefix(f"{side}_"))
        for side, rows in (("chosen", selection.chosen), ("rejected", selection.rejected))
    }
    both = pl.concat([sides["chosen"], sides["rejected"]], how="horizontal")
    return both.with_columns(
        prompt_id=pl.col("chosen_prompt_id"),
        language=_prompt_languages(both, contrast),
        pool_size=pl.Series(pools.sizes[here], dtype=pl.Int32),
        pool_mean=pl.Series(pools.mean[here], dtype=pl.Float64),
        pool_std=pl.Series(pools.std[here], dtype=pl.Float64),
    )


def _prompt_languages(picked: pl.DataFrame, contrast: Contrast) -> pl.Series:
    """The language each pair's prompt is in; "random" takes the chosen's or the rejected's by a digest of the
    prompt.
    """
    if contrast.prompt in ("chosen", "rejected"):
        return picked[f"{contrast.prompt}_language"]
    if contrast.prompt != "random":
        raise UserError(
            f'The prompt of a pair is "{contrast.prompt}"; expected "chosen", "rejected" or "random".'
        )
    columns = ("chosen_prompt_id", "chosen_language", "rejected_language")
    return pl.Series(
        [
            sides[digest("prompt-language", contrast.seed, prompt) % 2]
            for prompt, *sides in picked.select(columns).rows()
        ],
        dtype=pl.String,
    )


def with_texts(picked: pl.DataFrame, samples: Path, prompts: Path, where: pl.DataFrame) -> pl.DataFrame:
    """The picks with the prompt's messages and both completions; `where` says which shard holds which
    prompt.
    """
    located = picked.select("prompt_id", "language").join(
        where, on=["prompt_id", "language"], how="left", maintain_order="left"
    )
    if located["shard"].null_count():
        prompt_id, language, _ = located.filter(pl.col("shard").is_null()).row(0)
        raise UserError(
            f"{prompts} holds no prompt {prompt_id!r} in {language!r}, which a completion answers."
        )
    messages = gather(prompts, located, ("prompt_id", "language"), ("messages",))
    table = picked.with_columns(messages=messages["messages"])
    keys = [picked.select(pl.col(f"{side}_{name}").alias(name) for name in (*KEY, "shard")) for side in SIDES]
    # both sides at once: every shard is decoded once
    texts = gather(samples, pl.concat(keys), KEY, ("completion", "completion_ids"))
    for side, rows in zip(SIDES, (texts.head(picked.height), texts.tail(picked.height)), strict=True):
        table = table.with_columns(
            rows["completion"].alias(side), rows["completion_ids"].alias(f"{side}_ids")
        )
    return table.drop(
        "chosen_prompt_id",
        "rejected_prompt_id",
        "chosen_shard",
        "rejected_shard",
        "chosen_pool",
        "rejected_pool",
    )


def ledger_of(paired: Paired, first: int, last: int) -> pa.Table:
    """What the pools numbered from `first` up to `last` left out: completions that are no candidates, pools
    without pair.
    """
    rows = paired.rows.filter(pl.col("pool").is_between(first, last, closed="left"))
    completions = rows.filter(pl.col("reason").is_not_null()).select(
        pl.lit("completion").alias("unit"), *KEY, "reason"
    )
    names = rows.group_by("pool").agg(
        pl.col("prompt_id").first(),
        # a pool over several languages has none of its own
        pl.when(pl.col("language").n_unique() == 1)
        .then(pl.col("language").first())
        .otherwise(pl.lit("all"))
        .first(),
    )
    without = _pools_without_pair(paired).filter(pl.col("pool").is_between(first, last, closed="left"))
    pools = (
        without.join(names, on="pool")
        .sort("pool")
        .select(
            pl.lit("pool").alias("unit"),
            "prompt_id",
            "language",
            pl.lit(None, pl.Int32).alias("sample_id"),
            "reason",
        )
    )
    return pl.concat([completions, pools]).to_arrow().select(DROPPED.schema.names)


def _pools_without_pair(paired: Paired) -> pl.DataFrame:
    """The numbers of the pools that gave no pair, with the reason."""
    number = np.arange(paired.num_pools)
    sizes = np.zeros(paired.num_pools, dtype=np.int64)
    sizes[paired.numbers] = paired.pools.sizes
    has_pair = np.zeros(paired.num_pools, dtype=np.bool_)
    has_pair[paired.numbers] = paired.selection.rejected != NO_ROW
    reason = np.where(sizes == 0, NO_CANDIDATE, np.where(sizes == 1, ONE_CANDIDATE, NONE_BELOW))
    return pl.DataFrame(
        {"pool": number[~has_pair], "reason": reason[~has_pair].tolist()},
        schema_overrides={"reason": pl.String},
    )


def _account(work: Work, paired: Paired, contrast: Contrast) -> None:
    """Balance the completions, record what the report shows, and say so when the rule is the minimum in
    disguise.
    """
    dropped: Mapping[str, int] = dict(
        paired.rows.drop_nulls("reason")["reason"].value_counts(sort=True).rows()
    )
    candidates = paired.pools.rows.height
    balance(
        work.title,
        {"completion": paired.rows.height},
        {"completion": candidates},
        {"completion": sum(dropped.values())},
    )
    share = share_other_than_minimum(paired.pools, paired.selection)
    size = int(np.median(paired.pools.sizes)) if paired.pools.num_pools else 0
    num_pairs = int((paired.selection.rejected != NO_ROW).sum())
    work.record(
        completions=paired.rows.height, candidates=candidates, pools=paired.num_pools, pairs=num_pairs,
        median_pool_size=size, share_other_than_minimum=share,
    )  # fmt: skip
    if num_pairs and contrast.rejected != "min" and share < SMALL_SHARE:
        Console(stderr=True).print(
            f'{work.title}: "{contrast.rejected}" picked another completion than the minimum in {share:.0%} of '
            f"the pools (median size {size}); with small pools this rule is the minimum under another name.",
            markup=False,
            soft_wrap=True,
        )
