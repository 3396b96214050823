"""The contrast: from scored completions, sorted by pool, to pairs and to the ledger of what was left out.

Pools must be whole. Texts are asked for only of completions that may be near duplicates, and of those that are picked.

Shapes: R rows, P pools, K pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from croco.config.arms import Contrast, Guards
from croco.config.rules import parse_chosen, parse_rejected
from croco.stages.pair.guards import (
    LENGTH_RATIO,
    REASONS,
    SAME_TEXT,
    SMALL_GAP,
    Mask,
    Rows,
    is_wrong_language,
    judge,
)
from croco.stages.pair.select import NO_ROW, Pools, select
from croco.storage.schemas import PAIRS, REFERENCE
from croco.storage.seeds import digest

NO_CANDIDATE = "no candidate left in the pool"
ONE_CANDIDATE = "only one candidate in the pool"
NONE_BELOW = "no candidate scores below the chosen one"
NO_REFERENCE = "no scored gold completion"
SIDES = ("chosen", "rejected")
# columns of completions, and what they are called in pairs behind the side
TEXTS = {"completion": "", "completion_ids": "_ids", "finish_reason": "_finish_reason"}
Texts = Callable[[Rows, Sequence[str]], pl.DataFrame]  # some columns of TEXTS of some rows


@dataclass(frozen=True)
class Contrasted:
    """The pairs in columns of the pairs table (without `arm` and messages), the ledger, the languages of all
    candidates."""

    pairs: pl.DataFrame
    dropped: pl.DataFrame
    candidates: pl.Series


def contrast(
    rows: pl.DataFrame, rule: Contrast, known: Sequence[str] = (), texts: Texts | None = None, seed: int = 0
) -> Contrasted:
    """Guard, pool and select in whole pools. `rows` are as of `load_scores.by_pool`, with the columns `guards.TRAITS`
    where there are `texts`; without texts only scores are judged. A wrong language is one of the `known`."""
    completions = None if texts is None else lambda at: texts(at, ["completion"])["completion"]
    reason, flags = judge(rows, rule.guards, completions)
    gold = (rows["sample_id"] == REFERENCE).to_numpy()
    kept = np.flatnonzero(reason.is_null().to_numpy() & ~gold)
    pairs, pools = _selected(rows, kept, gold, rule)
    for side in SIDES:
        pairs = pairs.with_columns(_numbers(rows, pairs[f"{side}_row"], side))
    if texts is not None:
        pairs = _with_texts(pairs, texts)
    pairs, refused = _guarded(pairs, rule.guards, flags, known)
    left = _left(rows, pools, pairs, refused, gold if parse_chosen(rule.chosen).kind == "reference" else None)
    pairs = _prompted(pairs, rows, rule, seed)
    out = rows.with_columns(reason=reason).filter(pl.col("reason").is_not_null() & ~pl.Series(gold))
    refused = rows[refused["chosen_row"]].with_columns(reason=refused["reason"])
    dropped = pl.concat(
        [_ledger("completion", out), _ledger("pair", refused), _ledger("pool", left), _flagged(pairs)]
    )
    names = [name for name in PAIRS.schema.names if name in pairs.columns]
    return Contrasted(pairs.select(names), dropped, rows["language"].gather(kept))


def _selected(
    rows: pl.DataFrame, kept: Rows, gold: Mask, rule: Contrast
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The pairs as rows of both sides with the numbers of their pool, and the pools with their size."""
    part = rows if len(kept) == rows.height else rows[kept]
    num_languages = len(part["language"].dtype.categories)  # type: ignore[attr-defined]
    language = part["language"].to_physical().to_numpy().astype(np.int64)
    pools = Pools(
        part["pool"].to_numpy().astype(np.int64),
        part["calibrated"].to_numpy(),
        part["sample_id"].to_numpy().astype(np.int64) * num_languages + language,
    )
    number = pools.number[pools.starts]
    best = (
        rows.with_row_index("row").filter(pl.Series(gold) & pl.col("score").is_finite())
        .sort("pool", -pl.col("calibrated"), "row").unique("pool", keep="first", maintain_order=True)
    )  # fmt: skip
    reference = pl.DataFrame({"pool": pl.Series(number, dtype=rows.schema["pool"])}).join(
        best, on="pool", how="left", maintain_order="left"
    )
    chosen, rejected = parse_chosen(rule.chosen), parse_rejected(rule.rejected)
    gold_scores = reference["calibrated"].cast(pl.Float32).fill_null(float("nan")).to_numpy()
    picked = select(pools, chosen, rejected, rule.pairs_per_pool, gold_scores)
    at = picked["pool"].to_numpy()
    where = pl.Series(kept, dtype=pl.UInt32)
    one, other = (where.gather(picked[side].set(picked[side] == NO_ROW, None)) for side in SIDES)
    pairs = pl.DataFrame(
        {
            "pool": reference["pool"].gather(picked["pool"]),
            "pair_id": picked["pair_id"],
            "chosen_row": one if chosen.kind != "reference" else reference["row"].gather(picked["pool"]),
            "rejected_row": other,
            "pool_size": pools.sizes[at].astype(np.int32),
            "pool_mean": pools.mean[at],
            "pool_std": pools.std[at],
            "pool_min": pools.min[at].astype(np.float32),
        }
    )
    return pairs, reference.select("pool", pl.Series("size", pools.sizes))


def _numbers(rows: pl.DataFrame, at: pl.Series, side: str) -> pl.DataFrame:
    """Key, score and calibrated score of one side; null where there is none."""
    names = ["prompt_id"] * (side == "chosen") + ["language", "sample_id", "score", "calibrated"]
    picked = rows.select(pl.col(names).gather(at)).with_columns(pl.col(pl.Enum).cast(pl.String))
    return picked.rename({name: name if name == "prompt_id" else f"{side}_{name}" for name in names})


def _with_texts(pairs: pl.DataFrame, texts: Texts) -> pl.DataFrame:
    """The pairs with text, ids and finish reason of both sides."""
    rows = np.unique(pl.concat([pairs[f"{side}_row"] for side in SIDES]).drop_nulls().to_numpy())
    picked = texts(rows.astype(np.int64), list(TEXTS))
    for side in SIDES:
        row = pairs[f"{side}_row"]
        at = pl.Series(np.searchsorted(rows, row.fill_null(0).to_numpy())).set(row.is_null(), None)
        names = {name: side + suffix for name, suffix in TEXTS.items() if name in picked.columns}
        pairs = pairs.with_columns(picked.select(pl.col(list(names)).gather(at)).rename(names))
    return pairs


def _guarded(
    pairs: pl.DataFrame, guards: Guards, flags: dict[str, Mask], known: Sequence[str]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Pairs with their flags, without those that a guard of the pair drops; and those, with the reason."""
    gap = pl.col("chosen_calibrated") - pl.col("rejected_calibrated")
    hits = [(guards.score_gap, SMALL_GAP, gap < pl.lit(guards.min_score_gap, pl.Float32))]
    if "rejected" in pairs.columns:
        both = (pl.col("chosen_sample_id") != REFERENCE) & (pl.col("rejected_sample_id") != REFERENCE)
        same = "off" if guards.duplicate == "off" else guards.duplicate
        hits.append((same, SAME_TEXT, both & (pl.col("chosen") == pl.col("rejected"))))
        lengths = [pl.col(side).str.len_chars() for side in SIDES]
        longer, shorter = pl.max_horizontal(lengths), pl.min_horizontal(lengths)
        two = pl.col("rejected").is_not_null()
        hits.append((guards.length_ratio, LENGTH_RATIO, two & (longer > guards.max_length_ratio * shorter)))
    for name, flagged in flags.items():
        for side in SIDES:
            mark = pl.lit(pl.Series(flagged)).gather(pl.col(f"{side}_row"))
            hits.append(("flag", f"{side}: {REASONS[name]}", mark))
    dropping = [pl.when(hit).then(pl.lit(name)) for action, name, hit in hits if action == "drop"]
    pairs = pairs.with_columns(reason=pl.coalesce(*dropping, pl.lit(None, pl.String)))
    refused = pairs.filter(pl.col("reason").is_not_null()).select("pool", "chosen_row", "reason")
    pairs = pairs.filter(pl.col("reason").is_null()).drop("reason")
    marks = [pl.when(hit).then(pl.lit(name)) for action, name, hit in hits if action == "flag"]
    if guards.wrong_language == "flag" and "rejected" in pairs.columns:
        for side in SIDES:
            spoken = pairs.select(side, f"{side}_language").iter_rows()
            wrong = [
                text is not None and is_wrong_language(text, code, known, guards.min_letters)
                for text, code in spoken
            ]
            mark = pl.lit(pl.Series(wrong, dtype=pl.Boolean))
            marks.append(pl.when(mark).then(pl.lit(f"{side}: {REASONS['wrong_language']}")))
    empty = pl.lit([], pl.List(pl.String))
    return pairs.with_columns(flags=pl.concat_list(marks).list.drop_nulls() if marks else empty), refused


def _left(
    rows: pl.DataFrame, pools: pl.DataFrame, pairs: pl.DataFrame, refused: pl.DataFrame, gold: Mask | None
) -> pl.DataFrame:
    """The pools without a pair, with the reason; `gold` are the rows of gold completions where those are chosen."""
    pool = rows["pool"].to_numpy()
    first = np.flatnonzero(np.append(True, pool[1:] != pool[:-1])[: len(pool)])  # a row of each pool
    left = rows[first].join(pairs, on="pool", how="anti", maintain_order="left")
    left = left.join(pools, on="pool", how="left", maintain_order="left")
    left = left.join(refused.unique("pool", keep="last"), on="pool", how="left", maintain_order="left")
    scored = pl.lit(False)
    if gold is not None:
        scored = pl.col("pool").is_in(
            rows.filter(pl.Series(gold) & pl.col("score").is_finite())["pool"].implode()
        )
    why = (
        pl.when(pl.col("size").is_null()).then(pl.lit(NO_CANDIDATE))
        .when(pl.lit(gold is not None) & ~scored).then(pl.lit(NO_REFERENCE))
        .when(pl.lit(gold is None) & (pl.col("size") == 1)).then(pl.lit(ONE_CANDIDATE))
        .otherwise(pl.lit(NONE_BELOW))
    )  # fmt: skip
    return left.select(
        "prompt_id", language="group", sample_id=pl.lit(None, pl.Int32), reason=pl.coalesce("reason", why)
    )


def _prompted(pairs: pl.DataFrame, rows: pl.DataFrame, rule: Contrast, seed: int) -> pl.DataFrame:
    """The pairs with the language of their prompt: of the chosen, the rejected, either by a seeded digest, or a row for
    each."""
    pairs = pairs.with_columns(calibration=pl.lit(rule.calibration))
    if rule.prompt in SIDES:
        return pairs.with_columns(language=f"{rule.prompt}_language")
    if rule.prompt == "random":
        columns = ("prompt_id", "pair_id", "chosen_language", "rejected_language")
        drawn = [
            sides[digest("prompt-language", seed, prompt, pair_id) % 2]
            for prompt, pair_id, *sides in pairs.select(columns).rows()
        ]
        return pairs.with_columns(language=pl.Series(drawn, dtype=pl.String))
    spoken = rows.select("pool", pl.col("language").cast(pl.String)).unique(maintain_order=True)
    return pairs.join(spoken, on="pool", how="left", maintain_order="left_right")


def _ledger(unit: str, rows: pl.DataFrame) -> pl.DataFrame:
    names = (pl.col(name).cast(pl.String) for name in ("prompt_id", "language"))
    return rows.select(pl.lit(unit).alias("unit"), *names, "sample_id", pl.col("reason").cast(pl.String))


def _flagged(pairs: pl.DataFrame) -> pl.DataFrame:
    """A ledger row per flag of a pair, under the completion it is about; nothing was left out: the unit is "flag"."""
    flags = pairs.explode("flags").drop_nulls("flags").rename({"flags": "reason"})
    rejected = pl.col("reason").str.starts_with("rejected: ")
    of_side = {
        name: pl.when(rejected).then(f"rejected_{name}").otherwise(f"chosen_{name}")
        for name in ("language", "sample_id")
    }
    return _ledger(
        "flag",
        flags.with_columns(**of_side).unique(
            ("prompt_id", "language", "sample_id", "reason"), maintain_order=True
        ),
    )
