"""Measures of reward models on a table of scored pairs, and the page that shows them.

accuracy          share of pairs with the chosen above the rejected, equal scores ½ (also per category)
score-gap         mean of chosen minus rejected
chosen-*, rejected-*   mean, std and quantiles of the scores
score-length      Spearman's correlation of score and length in characters, over all completions of a language
prefers-longer    share of pairs with the longer completion above; beside it chosen-longer, what would be right
language-share    share of the variance of scores that is between languages (all of them, on shared prompts)
tau, same-order   agreement with the next model: Kendall's tau-b of scores, share of pairs put in the same order
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from croco.stages.evaluate import stats
from croco.storage.provenance import table_cell

ALL = "all"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SEED, RESAMPLES = 0, 2000
Row = dict[str, Any]


def scopes(table: pl.DataFrame) -> Iterator[tuple[str, str | None, pl.DataFrame]]:
    """(language, category, pairs): each language, all of them, and each category within either."""
    for language in [
        *table["language"].unique().sort(),
        *([ALL] if table["language"].n_unique() > 1 else []),
    ]:
        part = table if language == ALL else table.filter(pl.col("language") == language)
        yield language, None, part
        for category in part["category"].drop_nulls().unique().sort():
            yield language, category, part.filter(pl.col("category") == category)


def means(part: pl.DataFrame, **values: pl.Expr) -> Iterator[tuple[str, stats.Interval]]:
    """Means over pairs, with intervals over prompts."""
    sums = (
        part.select("prompt_id", pl.lit(1.0).alias("pairs"), **values)
        .group_by("prompt_id")
        .sum()
        .sort("prompt_id")
    )
    counts = stats.resample_counts(sums.height, SEED, RESAMPLES)
    matrix = sums.select(values.keys()).to_numpy().astype(np.float64)
    weights = np.repeat(sums["pairs"].to_numpy()[:, None], matrix.shape[1], axis=1)
    yield from zip(values, stats.bootstrap_ratio(matrix, weights, counts), strict=True)


def above(a: str, b: str) -> pl.Expr:
    """1 where a is above b, 0 below, ½ where they are equal."""
    return 0.5 + (pl.col(a) - pl.col(b)).sign().cast(pl.Float64) / 2


def rank(table: pl.DataFrame, number: int, model: str) -> Iterator[Row]:
    chosen, rejected = f"chosen_{number}", f"rejected_{number}"
    right = above(chosen, rejected)
    longer = above("chosen_length", "rejected_length")
    # with equal lengths there is no longer one, and nothing to prefer
    prefers = pl.when(longer == 1).then(right).when(longer == 0).then(1 - right).otherwise(0.5)
    for language, category, part in scopes(table):
        values = {"accuracy": right, "score-gap": pl.col(chosen) - pl.col(rejected)}
        if category is None:
            values |= {"prefers-longer": prefers, "chosen-longer": longer}
        for metric, (value, low, high) in means(part, **values):
            yield _row(model, language, category, metric, value, part.height, low, high)
        if category is None:
            for metric, value in distribution(part, chosen, rejected).items():
                yield _row(model, language, None, metric, value, part.height)
    if (share := language_share(table, chosen, rejected)) is not None:
        yield _row(model, ALL, None, "language-share", share[0], share[1])


def distribution(part: pl.DataFrame, chosen: str, rejected: str) -> dict[str, float]:
    """How the scores of a language lie, and how they go with length; a correlation that is not defined is left out."""
    values: dict[str, float] = {}
    for side, column in (("chosen", chosen), ("rejected", rejected)):
        scores = part[column].to_numpy()
        values |= {f"{side}-mean": float(scores.mean()), f"{side}-std": float(scores.std())}
        values |= {f"{side}-q{100 * q:02.0f}": float(np.quantile(scores, q)) for q in QUANTILES}
    scores = np.concatenate([part[chosen].to_numpy(), part[rejected].to_numpy()])
    lengths = np.concatenate([part["chosen_length"].to_numpy(), part["rejected_length"].to_numpy()])
    correlation = stats.spearman(scores, lengths)
    return values if math.isnan(correlation) else values | {"score-length": correlation}


def language_share(table: pl.DataFrame, chosen: str, rejected: str) -> tuple[float, int] | None:
    """η²: the variance between the languages' mean scores over that of all scores, on prompts that every language has,
    and the number of pairs; None without any."""
    num = table["language"].n_unique()
    shared = table.group_by("prompt_id").agg(pl.col("language").n_unique()).filter(pl.col("language") == num)
    part = table.join(shared.select("prompt_id"), on="prompt_id", how="semi")
    scores = pl.concat([part.select("language", score=column) for column in (chosen, rejected)])
    if num < 2 or scores.is_empty():
        return None
    total = float(((scores["score"] - scores["score"].mean()) ** 2).sum())
    means_of = scores.group_by("language").agg(pl.col("score").mean(), pl.len())
    between = float((means_of["len"] * (means_of["score"] - scores["score"].mean()) ** 2).sum())
    return (between / total, part.height) if total else None


def agreement(table: pl.DataFrame, number: int, rewards: Sequence[str]) -> Iterator[Row]:
    """How far a model and the next one rank alike."""
    one, other = f"{number}", f"{number + 1}"
    names = f"{rewards[number]} and {rewards[number + 1]}"
    same = above(f"chosen_{one}", f"rejected_{one}") == above(f"chosen_{other}", f"rejected_{other}")
    for language, category, part in scopes(table):
        if category is None:
            for metric, (value, low, high) in means(part, **{"same-order": same.cast(pl.Float64)}):
                yield _row(names, language, None, metric, value, part.height, low, high)
            sides = [
                np.concatenate([part[f"{side}_{i}"].to_numpy() for side in ("chosen", "rejected")])
                for i in (one, other)
            ]
            if not math.isnan(tau := stats.kendall(*sides)):
                yield _row(names, language, None, "tau", tau, part.height)


def _row(
    reward: str,
    language: str,
    category: str | None,
    metric: str,
    value: float,
    n: int,
    low: float | None = None,
    high: float | None = None,
) -> Row:
    return {"reward": reward, "language": language, "category": category, "metric": metric, "value": value,
            "ci_low": _end(low), "ci_high": _end(high), "n": n}  # fmt: skip


def _end(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


# The page ------------------------------------------------------------------------------------------------------------

SHOWN = (
    ("accuracy", "accuracy"),
    ("score-gap", "score gap"),
    ("chosen-mean", "chosen"),
    ("rejected-mean", "rejected"),
    ("score-length", "score × length"),
    ("prefers-longer", "prefers longer"),
    ("chosen-longer", "chosen is longer"),
)
AGREEMENT = (("same-order", "same order"), ("tau", "Kendall's tau"))


def markdown(
    ranking: pl.DataFrame, rewards: Sequence[str], num_left_out: int, reasons: Mapping[str, int]
) -> str:
    """Accuracy with intervals, scores, length; then categories; then how the models agree."""
    parts = ["# Reward models on preference pairs\n"]
    if num_left_out:
        most = sorted(reasons.items(), key=lambda item: -item[1])[:5]
        shown = "; ".join(f"{count} × {table_cell(reason)}" for reason, count in most)
        parts.append(f"{num_left_out} pairs were left out (`dropped.parquet`): {shown}.\n")
    for reward in rewards:
        own = ranking.filter(pl.col("reward") == reward)
        parts.append(f"## {table_cell(reward)}\n")
        parts.append(_table(own.filter(pl.col("category").is_null()), SHOWN, "language"))
        share = own.filter(pl.col("metric") == "language-share")
        if share.height:
            parts.append(
                f"{share['value'][0]:.0%} of the variance of scores is between languages ({share['n'][0]} pairs on "
                f"prompts that all of them have).\n"
            )
        if own["category"].drop_nulls().len():
            of_all = "all" if "all" in own["language"] else own["language"][0]
            parts.append(_table(own.filter((pl.col("language") == of_all) & pl.col("category").is_not_null()),
                                SHOWN[:2], "category"))  # fmt: skip
    for names in ranking["reward"].unique(maintain_order=True):
        if names not in rewards:
            parts.append(f"## {table_cell(names)}\n")
            parts.append(_table(ranking.filter(pl.col("reward") == names), AGREEMENT, "language"))
    return "\n".join(parts)


def _table(rows: pl.DataFrame, columns: Sequence[tuple[str, str]], by: str) -> str:
    cells = {(row[by], row["metric"]): row for row in rows.iter_rows(named=True)}
    shown = [(metric, title) for metric, title in columns if any(key[1] == metric for key in cells)]
    lines = [f"| {by} | pairs | " + " | ".join(title for _, title in shown) + " |"]
    lines.append("|---|---:|" + "---:|" * len(shown))
    for name in dict.fromkeys(key[0] for key in cells):
        count = next(row["n"] for key, row in cells.items() if key[0] == name and key[1] == shown[0][0])
        values = [_cell(cells.get((name, metric))) for metric, _ in shown]
        lines.append(f"| {table_cell(name)} | {count} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, float] | None) -> str:
    if row is None:
        return ""
    text = f"{row['value']:.2f}"
    return text if row["ci_low"] is None else f"{text} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]"
