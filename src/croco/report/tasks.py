"""EuroEval's datasets in a run's tables: every metric of every dataset by arm, as EuroEval names and scales it.

Nothing is averaged: a correlation, an exact match and an accuracy have no common mean.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl
from rich.table import Table

from croco import languages
from croco.config.evaluation import VERSION
from croco.config.load import load
from croco.config.recipe import Recipe
from croco.storage.shards import read_record, read_table

Row = tuple[str, str, str, list[str]]  # language, dataset, metric, a text per arm


def task_rows(run_folder: Path, recipe: Recipe) -> list[Row]:
    """One row per language, dataset and metric, in the order of the recipe's languages: "61.2 ± 1.4" per arm."""
    if recipe.euroeval is None:
        return []
    arms, found = ["base", *recipe.evaluated_arms], read_table(run_folder / "results")
    rows: list[Row] = []
    for language in recipe.run.evaluated:
        for dataset in recipe.euroeval.datasets_of(language):
            part = found.filter((pl.col("language") == language) & (pl.col("benchmark") == dataset))
            for metric in part["metric"].unique().sort().to_list():
                by_arm = {
                    row["arm"]: row for row in part.filter(pl.col("metric") == metric).iter_rows(named=True)
                }
                rows.append((language, dataset, metric, [_text(by_arm[arm]) for arm in arms]))
    return rows


def _text(row: dict[str, float]) -> str:
    half = (row["ci_high"] - row["ci_low"]) / 2
    return f"{row['value']:.1f} ± {half:.1f}".replace("-", "−")


def notes(run_folder: Path, recipe: Recipe) -> list[str]:
    """What a reader of the numbers has to know: how they were made, and what is not among them."""
    section = recipe.euroeval
    if section is None:
        return []
    lines = [
        f"EuroEval {VERSION}, split '{section.split}', {'few' if section.few_shot else 'zero'}-shot; its own metrics, "
        f"means and 95 % intervals over {section.iterations} iterations"
    ]
    none = [language for language in recipe.run.evaluated if not section.datasets_of(language)]
    if none:
        lines.append(f"Not covered by EuroEval: {', '.join(map(languages.name, none))}")
    facts = read_record(run_folder / "results")["facts"]
    if left_out := facts.get("datasets_left_out"):
        lines.append(f"Left out, since not every arm has them: {', '.join(left_out)}")
    for arm in ("base", *recipe.evaluated_arms):
        failed = read_record(run_folder / "euroeval" / arm)["facts"].get("failed_instances", {})
        if failed:
            counts = ", ".join(f"{dataset} {count:,}" for dataset, count in sorted(failed.items()))
            lines.append(f"Completions of {arm} in which EuroEval found no label or that failed: {counts}")
    return lines


def tasks_markdown(run_folder: Path, recipe: Recipe) -> str:
    """The table as Markdown; empty for a run without EuroEval."""
    if recipe.euroeval is None:
        return ""
    head = ["language", "dataset", "metric", "base", *recipe.evaluated_arms]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|" + "---:|" * (1 + len(recipe.evaluated_arms))]
    for language, dataset, metric, texts in task_rows(run_folder, recipe):
        lines.append("| " + " | ".join([language, dataset, metric, *texts]) + " |")
    said = "\n".join(f"- {line}." for line in notes(run_folder, recipe))
    return f"### Structured tasks\n\n{said}\n\n" + "\n".join(lines) + "\n"


def tasks_table(run_folder: Path) -> Table | None:
    """The table for a terminal; None for a run without EuroEval."""
    recipe = load(run_folder / "recipe.json")
    if recipe.euroeval is None:
        return None
    table = Table(title="\n".join(notes(run_folder, recipe)), title_justify="left")
    for name in ("language", "dataset", "metric", "base", *recipe.evaluated_arms):
        table.add_column(name, justify="left" if name in ("language", "dataset", "metric") else "right")
    for language, dataset, metric, texts in task_rows(run_folder, recipe):
        table.add_row(language, dataset, metric, *texts)
    return table
