"""The contrast: from scored completions, sorted by pool, to the pairs and to the account of what was left out.

Pure numbers, over as many pools as one likes: the stage calls it pool block by pool block, `croco.pairs` once.
Texts enter only through `Texts`, for the few completions that may be near duplicates.

Shapes: R completions, F references, P pools, K pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray

from croco.config.rules import parse_chosen, parse_rejected
from croco.stages.pair.guards import (
    CANDIDATE,
    LENGTH_RATIO,
    REASONS,
    SAME_TEXT,
    SMALL_GAP,
    Guards,
    Texts,
    Traits,
    Verdicts,
    judge,
)
from croco.stages.pair.keys import Keys
from croco.stages.pair.pools import Groups, Pools, build_pools
from croco.stages.pair.select import NO_ROW, References, Selection, select

NO_CANDIDATE = "no candidate left in the pool"
ONE_CANDIDATE = "only one candidate in the pool"
NONE_BELOW = "no candidate scores below the chosen one"
NO_REFERENCE = "no scored gold completion"


@dataclass(frozen=True)
class Contrast:
    """How pairs are chosen; see `croco.config.rules` for the words."""

    pool: str | Groups = "language"
    chosen: str = "max"
    rejected: str = "mean-2std"
    prompt: str = "chosen"  # whose language the pair's prompt is in: chosen, rejected, random, each
    calibration: str = "none"
    pairs_per_pool: int = 1
    guards: Guards = field(default_factory=Guards)
    seed: int = 0


@dataclass(frozen=True)
class Scored:
    """R completions sorted by pool, then language and sample; then F references, sorted by pool.

    `keys`, raw `score`, `calibrated` score and `pool` number are (R + F,); `place` (R + F,) says where the text
    is: a row of the completions or, for a reference, of the gold completions. `groups` names the group of
    languages of each pool, (num_pools,).
    """

    keys: Keys
    score: NDArray[np.float32]
    calibrated: NDArray[np.float32]
    pool: NDArray[np.int32]
    place: NDArray[np.int64]
    num_completions: int
    num_pools: int
    groups: list[str]
    group_of_pool: NDArray[np.int32]
    prompt_of_pool: NDArray[np.int32]

    def rows(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The completions and the references of the pools from `first` up to `last`, as row numbers."""
        edges = np.array([first, last], np.int32)  # the pools' own type: another would copy them all
        mine = np.searchsorted(self.pool[: self.num_completions], edges)
        gold = self.num_completions + np.searchsorted(self.pool[self.num_completions :], edges)
        return np.arange(*mine), np.arange(*gold)


@dataclass(frozen=True)
class Contrasted:
    """The pairs of some pools. `rows` (R,) are the completions looked at and `verdicts` theirs; `pairs` (K
    rows) has the columns pool, pair_id, chosen and rejected (row numbers of `Scored`; NO_ROW without a rejected
    one), pool_size, pool_mean, pool_std, pool_min, flags; `left` (pool, reason) are the pools without a pair,
    `refused` (chosen, reason) the pairs that a guard dropped.
    """

    rows: NDArray[np.int64]
    verdicts: Verdicts
    pairs: pl.DataFrame
    left: pl.DataFrame
    refused: pl.DataFrame

    @classmethod
    def joined(cls, parts: Sequence[Contrasted]) -> Contrasted:
        """Those of successive pools as one (flags of completions are in the pairs by then)."""
        return cls(
            np.concatenate([part.rows for part in parts]),
            Verdicts(np.concatenate([part.verdicts.dropped for part in parts]), {}),
            *(pl.concat([getattr(part, name) for part in parts]) for name in ("pairs", "left", "refused")),
        )


def contrast(
    scored: Scored,
    first: int,
    last: int,
    how: Contrast,
    traits: Traits | None = None,
    texts: Texts | None = None,
) -> Contrasted:
    """Guard, pool and select in the pools from `first` up to `last`.

    `traits` are of the pools' completions in their order, then of their references; without them only scores are
    judged. `texts` gives the texts of completions by their number in that order.
    """
    rows, gold = scored.rows(first, last)
    keys = scored.keys
    group = keys.prompt[rows].astype(np.int64) * len(keys.languages) + keys.language[rows]
    if traits is None or texts is None:
        finite = np.isfinite(scored.score[rows])
        verdicts = Verdicts(np.where(finite, CANDIDATE, 0).astype(np.int8), {})
    else:
        mine = traits.take(np.arange(len(rows)))
        verdicts = judge(group, scored.score[rows], mine, how.guards, texts)
    kept = np.flatnonzero(verdicts.dropped == CANDIDATE)
    of = rows[kept]
    order = keys.sample[of].astype(np.int64) * len(keys.languages) + keys.language[of]
    pools = build_pools(scored.pool[of], scored.calibrated[of], order)
    number = scored.pool[of][pools.starts].astype(np.int64)
    usable = gold[np.isfinite(scored.score[gold]) & np.isin(scored.pool[gold], number)]
    references = References(np.searchsorted(number, scored.pool[usable]), scored.calibrated[usable])
    rejected = parse_rejected(how.rejected)
    found = select(pools, parse_chosen(how.chosen), rejected, how.pairs_per_pool, references)
    # rows of Scored, and in the order of the traits
    both, at = np.concatenate([of, usable]), np.concatenate([kept, len(rows) + np.searchsorted(gold, usable)])
    pairs = _pairs(pools, number, found, both)
    pairs, refused = _guarded(pairs, found, at, scored, how.guards, traits, verdicts)
    left = _left(
        scored, first, last, pools, number, pairs, refused, references if how.chosen == "reference" else None
    )
    return Contrasted(rows, verdicts, pairs, left, refused)


def _pairs(
    pools: Pools, number: NDArray[np.int64], found: Selection, both: NDArray[np.int64]
) -> pl.DataFrame:
    minimum = np.minimum.reduceat(pools.score, pools.starts) if len(pools) else pools.score
    rejected = (
        np.where(found.rejected == NO_ROW, NO_ROW, both[found.rejected]) if len(both) else found.rejected
    )
    return pl.DataFrame(
        {
            "pool": number[found.pool],
            "pair_id": found.number.astype(np.int32),
            "chosen": both[found.chosen] if len(both) else found.chosen,
            "rejected": rejected,
            "pool_size": pools.sizes[found.pool].astype(np.int32),
            "pool_mean": pools.mean[found.pool],
            "pool_std": pools.std[found.pool],
            "pool_min": minimum[found.pool],
        }
    )


def _guarded(
    pairs: pl.DataFrame,
    found: Selection,
    at: NDArray[np.int64],
    scored: Scored,
    guards: Guards,
    traits: Traits | None,
    verdicts: Verdicts,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Pairs with their flags, without those that a guard of the pair drops; and those, with the reason."""
    two = found.rejected != NO_ROW
    chosen, rejected = (
        at[found.chosen] if len(at) else found.chosen,
        at[found.rejected] if len(at) else found.rejected,
    )
    hits: list[tuple[str, str, NDArray[np.bool_]]] = []
    one, other = (scored.calibrated[pairs[side].to_numpy()] for side in ("chosen", "rejected"))
    hits.append((guards.score_gap, SMALL_GAP, two & (one - other < np.float32(guards.min_score_gap))))
    if traits is not None:
        if len(traits.text) and guards.duplicate != "off":  # of two languages: one language holds a text once
            both = (chosen < len(traits.text)) & (rejected < len(traits.text)) & two
            one_text, other_text = (traits.text[np.where(both, picked, 0)] for picked in (chosen, rejected))
            hits.append((guards.duplicate, SAME_TEXT, both & (one_text == other_text)))
        length = traits.characters.astype(np.float64)
        longer, shorter = (
            np.maximum(length[chosen], length[rejected]),
            np.minimum(length[chosen], length[rejected]),
        )
        hits.append((guards.length_ratio, LENGTH_RATIO, two & (longer > guards.max_length_ratio * shorter)))
    for name, flagged in verdicts.flags.items():
        for side, picked in (("chosen", chosen), ("rejected", rejected)):
            mine = (picked < len(flagged)) & (two | (side == "chosen"))  # a gold completion has no flags
            hits.append(("flag", f"{side}: {REASONS[name]}", mine & flagged[np.where(mine, picked, 0)]))
    marks = [(name, hit) for action, name, hit in hits if action == "flag" and hit.any()]
    drops = [(name, hit) for action, name, hit in hits if action == "drop" and hit.any()]
    flags: list[list[str]] = [[] for _ in range(len(pairs))] if marks else []
    for name, hit in marks:
        for k in np.flatnonzero(hit):
            flags[k].append(name)
    reason = np.select([hit for _, hit in drops], [name for name, _ in drops], default="") if drops else None
    empty = pl.lit([], pl.List(pl.String))
    pairs = pairs.with_columns(
        flags=pl.Series(flags, dtype=pl.List(pl.String)) if marks else empty,
        reason=pl.lit("") if reason is None else pl.Series(reason.tolist(), dtype=pl.String),
    )
    refused = pairs.filter(pl.col("reason") != "").select("pool", "chosen", "reason")
    return pairs.filter(pl.col("reason") == "").drop("reason"), refused


def _left(
    scored: Scored,
    first: int,
    last: int,
    pools: Pools,
    number: NDArray[np.int64],
    pairs: pl.DataFrame,
    refused: pl.DataFrame,
    references: References | None,
) -> pl.DataFrame:
    """The pools without a pair, with the reason."""
    sizes = np.zeros(last - first, np.int64)
    sizes[number - first] = pools.sizes
    gold = np.ones(last - first, np.bool_)
    if references is not None:
        gold[:] = False
        gold[number[references.pool] - first] = True
    reason = np.select(
        [sizes == 0, ~gold, (sizes == 1) & (references is None)],
        [NO_CANDIDATE, NO_REFERENCE, ONE_CANDIDATE],
        default=NONE_BELOW,
    ).astype(object)
    reason[refused["pool"].to_numpy() - first] = refused["reason"].to_list()
    without = np.ones(last - first, np.bool_)
    without[pairs["pool"].to_numpy() - first] = False
    return pl.DataFrame(
        {"pool": np.flatnonzero(without) + first, "reason": reason[without].tolist()},
        schema={"pool": pl.Int64, "reason": pl.String},
    )
