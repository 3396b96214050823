"""The charts that are curves: score distributions and training metrics, as SVG paths.

A path is drawn in a box of 100 by 100 that the page stretches to any size (strokes keep their width), and its labels
are the page's own text. Nothing is decided here about which numbers are shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from croco.report.charts import Axis, axis
from croco.report.table import MINUS, Unit
from croco.stages.evaluate.stats import Interval

BINS = 72


@dataclass(frozen=True)
class Ridge:
    """One language: the distribution of all scores, of the chosen and of the rejected, and how many they are."""

    language: str
    everything: str  # lines; empty without rows
    chosen: str
    rejected: str
    counts: list[int]  # of all, chosen, rejected
    means: list[float | None]


def ridges(
    scores: pl.DataFrame, pairs: pl.DataFrame, languages: Sequence[str]
) -> tuple[list[Ridge], list[tuple[float, str]]]:
    """Per language its distributions, equal in area and on one scale for all languages; and the scale's ticks."""
    ends = [scores["score"].quantile(q) or 0.0 for q in (0.001, 0.999)]
    if pairs.height:
        sides = (("rejected_score", 0.01), ("chosen_score", 0.99))
        ends += [end for name, q in sides if (end := pairs[name].quantile(q)) is not None]
    scale = axis(ends, with_zero=False, num_ticks=6)
    edges = np.linspace(scale.low, scale.high, BINS + 1)
    made = []
    for language in languages:
        columns = [
            scores.filter(pl.col("language") == language)["score"],
            pairs.filter(pl.col("chosen_language") == language)["chosen_score"].drop_nulls(),
            pairs.filter(pl.col("rejected_language") == language)["rejected_score"].drop_nulls(),
        ]
        if all(column.is_empty() for column in columns):
            continue  # an arm may be of some languages only
        densities = [_density(column.to_numpy(), edges) for column in columns]
        top = max(float(density.max()) for density in densities) or 1.0
        everything, chosen, rejected = (_outline(density / top) for density in densities)
        counts = [len(column) for column in columns]
        means = [None if column.is_empty() else float(np.mean(column.to_numpy())) for column in columns]
        made.append(Ridge(language, everything, chosen, rejected, counts, means))
    return made, [(scale.place(tick), _tick(tick)) for tick in scale.ticks]


def _density(values: NDArray[np.float32], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """A smoothed histogram; all zero without values."""
    counts, _ = np.histogram(values, bins=edges)
    kernel = np.exp(-0.5 * (np.arange(-5, 6) / 1.8) ** 2)
    return np.convolve(counts / max(1, counts.sum()), kernel / kernel.sum(), mode="same")


def _outline(heights: NDArray[np.float64]) -> str:
    """A line over the part where there is something to see."""
    seen = np.flatnonzero(heights > 0.004)
    if not len(seen):
        return ""
    part = slice(max(0, seen[0] - 1), seen[-1] + 2)
    places = 100 * (np.arange(len(heights)) + 0.5) / len(heights)
    return _line(list(zip(places[part], 98 - 94 * heights[part], strict=True)))


def _line(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


@dataclass(frozen=True)
class Curve:
    """One arm in a panel: a line with dots on it, or beside it where they are of pairs held out."""

    series: int
    arm: str
    path: str
    dots: list[tuple[float, float]]  # percent from the left, from the top
    last: str
    bars: str = ""  # the intervals of the dots, as lines


@dataclass(frozen=True)
class Panel:
    """Curves over steps or over another number."""

    title: str
    curves: list[Curve]
    rows: list[tuple[float, str]]  # ticks of the value: percent from the top, label
    columns: list[tuple[float, str]]  # ticks of the step
    marks: list[tuple[float, int, str]] = field(default_factory=list)  # percent from the left, series, words
    over: str = "steps"


def value_panel(
    title: str, series: Mapping[str, Sequence[tuple[float, Interval]]], unit: Unit, grid: bool = True
) -> Panel:
    """Values with intervals over a number. Those of a `grid` are marked on the axis, on a scale of doublings where they
    span a factor of 8; others were measured."""
    numbers = sorted({x for points in series.values() for x, _ in points})
    doublings = grid and len(numbers) > 2 and numbers[0] > 0 and numbers[-1] / numbers[0] >= 8
    places = {x: math.log2(x) if doublings else x for x in numbers}
    across = axis(list(places.values()), with_zero=False)
    intervals = [interval for points in series.values() for _, interval in points]
    ends = [end for interval in intervals for end in interval if not math.isnan(end)]
    up = axis(ends, with_zero=grid, num_ticks=4)
    curves = []
    for place, (name, points) in enumerate(series.items()):
        dots = [(across.place(places[x]), round(100 - up.place(i.value), 2)) for x, i in points]
        bars = "".join(
            _line([(dot[0], 100 - up.place(i.low)), (dot[0], 100 - up.place(i.high))])
            for dot, (_, i) in zip(dots, points, strict=True)
            if i.known
        )
        curves.append(Curve(place, name, _line(dots), dots, unit.text(points[-1][1].value), bars))
    ticks = places if grid else {tick: tick for tick in across.ticks}
    return Panel(
        title, curves, [(100 - up.place(tick), unit.text(tick)) for tick in up.ticks],
        [(across.place(place), f"{x:g}") for x, place in ticks.items()], over=title,
    )  # fmt: skip


def panels(metrics: Mapping[str, Sequence[Mapping[str, Any]]], titles: Mapping[str, str]) -> list[Panel]:
    """A panel for every metric that some arm has; the sentinel's marks stand in all of them."""
    last_step = max(
        (line["step"] for lines in metrics.values() for line in lines if "step" in line), default=0
    )
    across = Axis(0, last_step, axis([0, last_step], num_ticks=4).ticks)
    columns = [(across.place(tick), _tick(tick)) for tick in across.ticks if 0 <= tick <= last_step]
    marks = [
        (across.place(step), series, f"{arm}, step {step}: {text}")
        for series, arm, step, text in sentinel(metrics)
    ]
    made = []
    for column, title in titles.items():
        points = {
            arm: [(line["step"], line.get("split", "train"), float(line[column])) for line in lines
                  if isinstance(line.get(column), int | float) and math.isfinite(line[column])]
            for arm, lines in metrics.items()
        }  # fmt: skip
        if not any(points.values()):
            continue
        up = axis([value for of in points.values() for *_, value in of], with_zero=False, num_ticks=4)
        curves = []
        for series, (arm, of) in enumerate(points.items()):
            places = [(across.place(step), 100 - up.place(value), split) for step, split, value in of]
            line = [(x, y) for x, y, split in places if split == "train"]
            dots = [(x, y) for x, y, split in places if split == "validation"]
            if of:
                last = f"{of[-1][2]:.3g}".replace("-", MINUS)
                curves.append(Curve(series, arm, _line(line) if line else "", dots, last))
        made.append(
            Panel(title, curves, [(100 - up.place(tick), _tick(tick)) for tick in up.ticks], columns, marks)
        )
    return made


def sentinel(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[int, str, int, str]]:
    """What the sentinel noted: the arm's place and name, the step, its sentence."""
    return [
        (series, arm, line["step"], str(line["reason"]))
        for series, (arm, lines) in enumerate(metrics.items())
        for line in lines
        if line.get("split") == "stopped"
    ]


def _tick(value: float) -> str:
    return f"{value:,.4g}".replace("-", MINUS)
