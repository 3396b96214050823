"""Results that are no board: what to think of the arena's judge, and the metrics of structured tasks.

Nothing is averaged here: a correlation and an accuracy have no common mean, so every metric keeps its own line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from croco.report.load_run import Run
from croco.report.scores import ARENA, MINUS, Board, scope_name, temperature_name
from croco.stages.evaluate.results import BASE, GROUPS, headline

RIGHT = "right-language"
# metric -> heading, factor, how it is written
JUDGED = {
    "win-rate": ("win rate", 100, "{:.0f} %"),
    "lc-win-rate": ("length-controlled", 100, "{:.0f} %"),
    "tie": ("ties", 100, "{:.0f} %"),
    "self-consistency": ("both orders agree", 100, "{:.0f} %"),
    "position-bias": ("leans to the first shown", 100, "{:+.0f} points"),
    "length-difference": ("characters longer", 1, "{:+.0f}"),
    "right-language": ("right language", 100, "{:.0f} %"),
}


@dataclass(frozen=True)
class Grid:
    """A table of texts: headings, rows of a name with its texts, and an interval for each text where there is one."""

    headings: list[str]
    rows: list[tuple[str, list[tuple[str, str] | None]]]


def judged(results: pl.DataFrame, arms: Sequence[str]) -> Grid | None:
    """The arena's figures over all languages, one row per arm."""
    rows = results.filter((pl.col("benchmark") == ARENA) & (pl.col("language") == "all"))
    values = _values(rows)
    metrics = [metric for metric in JUDGED if any((arm, metric) in values for arm in arms)]
    if not metrics:
        return None
    found = [
        (arm, [_text(values.get((arm, metric)), *JUDGED[metric][1:]) for metric in metrics])
        for arm in (BASE, *arms)
        if any((arm, metric) in values for metric in metrics)
    ]
    return Grid([JUDGED[metric][0] for metric in metrics], found)


def domains(results: pl.DataFrame, arms: Sequence[str]) -> Grid | None:
    """Win rates per domain of the prompts, over all languages."""
    rows = results.filter(
        (pl.col("benchmark") == ARENA)
        & (pl.col("language") == "all")
        & pl.col("metric").str.starts_with("win-rate:")
    )
    values = _values(rows)
    names = sorted({metric for _, metric in values})
    if not names:
        return None
    found = [(arm, [_text(values.get((arm, name)), 100, "{:.0f} %") for name in names]) for arm in arms]
    return Grid([name.removeprefix("win-rate:") for name in names], found)


def _values(rows: pl.DataFrame) -> dict[tuple[str, str], tuple[float, float, float]]:
    return {
        (arm, metric): (value, low, high)
        for arm, metric, value, low, high in rows.select(
            "arm", "metric", "value", "ci_low", "ci_high"
        ).iter_rows()
    }


def _text(found: tuple[float, float, float] | None, factor: float, form: str) -> tuple[str, str] | None:
    if found is None:
        return None
    value, low, high = (factor * end for end in found)
    ends = form.split("}")[0] + "}"
    return _zero(form.format(value)), f"{_zero(ends.format(low))} to {_zero(ends.format(high))}"


def _zero(text: str) -> str:
    """A number with a real minus sign, and a zero without any sign."""
    return re.sub(r"^[+-](?=0(\.0+)?( |$))", "", text).replace("-", MINUS)


def fidelity(results: pl.DataFrame, board: Board) -> Grid | None:
    """The share of completions in the right language, of those whose language could be told, by group."""
    rows = results.filter(
        (pl.col("benchmark") == board.benchmark)
        & (pl.col("metric") == RIGHT)
        & pl.col("language").is_in(board.groups)
    )
    if rows.is_empty():
        return None
    found = []
    for arm, temperature in board.settings:
        part = rows.filter((pl.col("arm") == arm) & (pl.col("temperature") == temperature))
        values = {
            row["language"]: (row["value"], row["ci_low"], row["ci_high"])
            for row in part.iter_rows(named=True)
        }
        texts = [_text(values.get(scope), 100, "{:.0f} %") for scope in board.groups]
        found.append((f"{arm}, {temperature_name(temperature)}", texts))
    return Grid(board.groups, found)


def costs(run: Run) -> list[tuple[str, str]]:
    """What judging took and what got no verdict, per arm, as far as the stage recorded it."""
    lines = []
    for arm in run.recipe.evaluated_arms:
        facts: Mapping[str, Any] = run.stages.get(f"arena/{arm}", {}).get("facts", {})
        words = [
            f"{int(facts[name]):,} {label}"
            for name, label in (
                ("comparisons", "comparisons"),
                ("same_text", "of the same text twice"),
                ("inconsistent", "in which the two orders disagree"),
                ("judgements", "judgements"),
                ("judge_prompt_tokens", "tokens read by the judge"),
                ("judge_completion_tokens", "tokens written by it"),
            )
            if facts.get(name) is not None
        ]
        words += [f"{count:,} × {reason}" for reason, count in (facts.get("without_verdict") or {}).items()]
        if words:
            lines.append((arm, ", ".join(words)))
    return lines


@dataclass(frozen=True)
class Task:
    """One metric of one dataset in one language, for every arm; `best` are the arms with the highest value."""

    language: str
    dataset: str
    metric: str
    texts: list[tuple[str, str] | None]
    best: list[bool]


def tasks(results: pl.DataFrame, arms: Sequence[str], codes: Sequence[str]) -> list[Task]:
    """Every metric of those benchmarks that are neither shares of good completions, mean scores nor the arena."""
    own = {
        name
        for (name,), part in results.group_by("benchmark")
        if headline(str(name)) in part["metric"].to_list()
    }
    rows = results.filter(~pl.col("benchmark").is_in([*own, ARENA]) & ~pl.col("language").is_in(GROUPS))
    values: dict[tuple[str, str, str], dict[str, tuple[float, float, float]]] = {}
    for row in rows.iter_rows(named=True):
        key = (row["language"], row["benchmark"], row["metric"])
        values.setdefault(key, {})[row["arm"]] = (row["value"], row["ci_low"], row["ci_high"])
    order = {code: place for place, code in enumerate(codes)}
    found = []
    for key in sorted(values, key=lambda key: (order.get(key[0], len(order)), key)):
        of = values[key]
        top = max(value for value, _, _ in of.values())
        names = (BASE, *arms)
        texts = [_text(of.get(arm), 1, "{:.1f}") for arm in names]
        found.append(
            Task(scope_name(key[0]), *key[1:], texts, [arm in of and of[arm][0] == top for arm in names])
        )
    return found
