"""The charts that are tables: heat map, forest plot, stacked bars, as rows that the page's templates lay out.

Marks are placed in percent of their cell, so that text and marks keep their size on any screen, and every chart is a
table that a screen reader reads. Only places and steps of colour are computed here; colours are the stylesheet's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from croco.report.scores import Board, Cell
from croco.report.table import Number, temperature_name
from croco.stages.evaluate.results import BASE
from croco.stages.evaluate.stats import Interval, verdict

# the known modes in the order of bars and legends, each with its place in the palette; others come last and get 7
MODES = {
    "good": 1, "right-language": 1, "careful-wrong": 2, "terse": 3, "rambling": 4, "wrong-language": 5, "evasive": 6,
    "malformed": 7,
}  # fmt: skip
STEPS = 4  # of colour, to each side of zero


@dataclass(frozen=True)
class Axis:
    """A linear scale with round ticks."""

    low: float
    high: float
    ticks: list[float]

    def place(self, value: float) -> float:
        """Percent from the left end."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)


def axis(values: Sequence[float], with_zero: bool = True, num_ticks: int = 7) -> Axis:
    """An axis that holds all values, its ends a little beyond them and its ticks at 1, 2 or 5 times a power of ten."""
    low, high = min([*values, 0.0] if with_zero else values), max([*values, 0.0] if with_zero else values)
    span = (high - low) or abs(high) or 1.0
    low, high = low - 0.04 * span, high + 0.04 * span
    raw = (high - low) / num_ticks
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * unit for unit in (1, 2, 5, 10) if power * unit >= raw)
    first = math.ceil(low / step)
    ticks = [round(number * step, 10) for number in range(first, math.floor(high / step) + 1)]
    return Axis(low, high, ticks)


@dataclass(frozen=True)
class Mark:
    """One interval in a forest plot: its arm's place in the palette, its places in percent, and its words."""

    series: int
    value: float
    low: float
    high: float
    short: str
    text: str
    verdict: str


@dataclass(frozen=True)
class Forest:
    """Intervals of several arms, one row per group or language."""

    temperature: float
    title: str
    ticks: list[tuple[float, str]]  # place, label
    rows: list[tuple[str, bool, list[Mark]]]  # scope, whether it is a group, marks


def forests(board: Board, arms: Sequence[str], scopes: Sequence[str]) -> list[Forest]:
    """One forest per temperature that some arm shares with the base: the arms' differences from the base."""
    differences = {
        (arm, temperature, scope): cell.difference
        for (arm, temperature, scope), cell in board.cells.items()
        if cell.difference is not None and scope in scopes
    }
    if not differences:
        return []
    scale = axis([end for difference in differences.values() for end in difference if not math.isnan(end)])
    ticks = [(scale.place(tick), board.change.text(tick)) for tick in scale.ticks]
    made = []
    for temperature in sorted({key[1] for key in differences}):
        rows = [
            (scope, scope in board.groups, [
                _mark(board, scale, arms.index(arm), arm, differences[arm, temperature, scope])
                for arm in arms if (arm, temperature, scope) in differences
            ])
            for scope in scopes
        ]  # fmt: skip
        made.append(Forest(temperature, decoding_title(temperature), ticks, rows))
    return made


def decoding_title(temperature: float) -> str:
    return "Greedy" if temperature == 0 else f"Sampled at {temperature_name(temperature)}"


def _mark(board: Board, scale: Axis, series: int, arm: str, difference: Interval) -> Mark:
    drawn = difference if difference.known else Interval(*[difference.value] * 3)  # a mark without a line
    value, low, high = (scale.place(end) for end in drawn)
    number, word = Number(difference, board.change), verdict(difference)
    return Mark(series, value, low, high, number.text, f"{arm} {number.with_interval}, {word}", word)


# a temperature by name, and per scope the text, the step of colour and the words of a cell, or null
HeatRow = tuple[str, list[tuple[str, str, str] | None]]


@dataclass(frozen=True)
class Heat:
    """A heat map: one row per arm and temperature, one column per group and language."""

    title: str
    kind: str  # "difference" or "level"
    columns: list[tuple[str, list[str]]]  # heading, the scopes under it
    arms: list[tuple[str, list[HeatRow]]]
    scale: list[tuple[str, str]]  # CSS class, label


def heats(
    board: Board,
    members: Mapping[str, Sequence[str]],
    titles: tuple[str, str] = ("Change from the base", "Level"),
) -> list[Heat]:
    """Change from the base, and level, of every arm in every group and language."""
    rest = [c for c in board.languages if not any(c in codes for codes in members.values())]
    blocks = {"group": board.groups, **members, "other": rest}
    columns = [
        (name, here)
        for name, scopes in blocks.items()
        if (here := [scope for scope in scopes if scope in board.scopes])
    ]
    scopes = [scope for _, block in columns for scope in block]
    made = []
    differences = [abs(c.difference.value) for c in board.cells.values() if c.difference]
    if differences:
        top = max(differences) or 1.0
        rows = [
            (arm, temperature_name(t), [_change(board, board.cell(arm, t, scope), top) for scope in scopes])
            for arm, t in board.settings
            if arm != BASE and any((cell := board.cell(arm, t, s)) and cell.difference for s in scopes)
        ]
        ends = [top * step / STEPS for step in range(1, STEPS + 1)]
        scale = [(f"dm{step}", board.change.text(-ends[step - 1])) for step in range(STEPS, 0, -1)]
        scale += [(f"dp{step}", board.change.text(ends[step - 1])) for step in range(1, STEPS + 1)]
        made.append(Heat(titles[0], "difference", columns, _by_arm(rows), scale))
    values = [cell.value.value for cell in board.cells.values()]
    low, high = (0.0, max([*values, 0.01])) if board.is_share else (min(values), max(values))
    rows = [
        (arm, temperature_name(t), [_level(board, board.cell(arm, t, scope), low, high) for scope in scopes])
        for arm, t in board.settings
    ]
    span = (high - low) or 1.0
    scale = [(f"s{step}", board.unit.text(low + span * step / 5)) for step in range(6)]
    made.append(Heat(titles[1], "level", columns, _by_arm(rows), scale))
    return made


def _by_arm(
    rows: Sequence[tuple[str, str, list[tuple[str, str, str] | None]]],
) -> list[tuple[str, list[HeatRow]]]:
    return [(arm, [row[1:] for row in block]) for arm, block in groupby(rows, key=lambda row: row[0])]


def _change(board: Board, cell: Cell | None, top: float) -> tuple[str, str, str] | None:
    if cell is None or cell.difference is None:
        return None
    number, word, name = Number(cell.difference, board.change), verdict(cell.difference), "d0"
    if word != "not resolved":
        step = min(STEPS, max(1, math.ceil(STEPS * abs(cell.difference.value) / top - 1e-9)))
        name = f"d{'p' if cell.difference.value > 0 else 'm'}{step}"
    return number.text, name, "; ".join(filter(None, [f"{number.with_interval}, {word}", cell.remark]))


def _level(board: Board, cell: Cell | None, low: float, high: float) -> tuple[str, str, str] | None:
    if cell is None:
        return None
    step, number = round(5 * (cell.value.value - low) / ((high - low) or 1.0)), Number(cell.value, board.unit)
    return number.text, f"s{step}", number.with_interval
