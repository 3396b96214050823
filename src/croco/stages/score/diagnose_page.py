"""The ranking table as Markdown: a table a model, languages as rows."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

COLUMNS = (
    ("accuracy", "accuracy"),
    ("score-gap", "score gap"),
    ("chosen-mean", "chosen"),
    ("rejected-mean", "rejected"),
    ("score-length", "score × length"),
    ("prefers-longer", "prefers longer"),
    ("chosen-longer", "chosen is longer"),
)
AGREEMENT = (("same-order", "same order"), ("tau", "Kendall's tau"))


def markdown(ranking: pl.DataFrame, rewards: Sequence[str], num_dropped: int) -> str:
    """Accuracy with intervals, scores, length; then categories; then how the models agree."""
    parts = ["# Reward models on preference pairs\n"]
    if num_dropped:
        parts.append(f"Pairs were left out: {num_dropped} rows of the ledger, `dropped.parquet`.\n")
    for reward in rewards:
        own = ranking.filter(pl.col("reward") == reward)
        parts.append(f"## {escaped(reward)}\n")
        parts.append(_table(own.filter(pl.col("category").is_null()), COLUMNS, "language"))
        share = own.filter(pl.col("metric") == "language-share")
        if share.height:
            parts.append(
                f"{share['value'][0]:.0%} of the variance of scores is between languages ({share['n'][0]} pairs on "
                f"prompts that all of them have).\n"
            )
        if own["category"].drop_nulls().len():
            of_all = "all" if "all" in own["language"] else own["language"][0]
            parts.append(_table(own.filter((pl.col("language") == of_all) & pl.col("category").is_not_null()),
                                COLUMNS[:2], "category"))  # fmt: skip
    for names in ranking["reward"].unique(maintain_order=True):
        if names not in rewards:
            parts.append(f"## {escaped(names)}\n")
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
        lines.append(f"| {escaped(name)} | {count} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, float] | None) -> str:
    if row is None:
        return ""
    text = f"{row['value']:.2f}"
    return text if row["ci_low"] is None else f"{text} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]"


def escaped(text: str) -> str:
    """Text of a file as one cell of a table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
