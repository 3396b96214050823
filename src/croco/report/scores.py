"""The tables people read: arms by groups of languages, arms by language, one sentence per arm.

Pure arrangements of the results table; the page, the terminal and the exports print the same numbers
because they take them from here. Shares are shown as whole percentages and their differences as points;
scores with two decimals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from croco import languages
from croco.stages.evaluate.results import BASE, GROUPS, headline
from croco.stages.evaluate.stats import Interval, verdict

TITLES = {
    "lab": "Tasks seen in tuning",
    "lab-held-out-task": "Task kept out of tuning",
    "reward": "Reward model's score",
    "arena": "Judged against the base",
}
ARENA = "arena"
MINUS = "−"


@dataclass(frozen=True)
class Cell:
    """One arm at one temperature in one language or group; differences are null for the base."""

    value: Interval
    difference: Interval | None
    to_best: Interval | None
    num_prompts: int
    holm: float | None = None  # the difference's p-value, adjusted over all languages and arms
    needed: float | None = None  # prompts that would resolve it


@dataclass(frozen=True)
class Board:
    """All cells of one benchmark. `settings` are (arm, temperature), the base first; `scopes` languages and
    groups.
    """

    benchmark: str
    settings: list[tuple[str, float]]
    scopes: list[str]
    cells: Mapping[tuple[str, float, str], Cell]
    best_base: Mapping[str, float]  # scope -> the temperature at which the base did best

    @property
    def title(self) -> str:
        return TITLES.get(self.benchmark, self.benchmark)

    @property
    def is_share(self) -> bool:
        return self.benchmark == ARENA or headline(self.benchmark) == "good"

    @property
    def groups(self) -> list[str]:
        return [scope for scope in self.scopes if scope in GROUPS]

    @property
    def languages(self) -> list[str]:
        return [scope for scope in self.scopes if scope not in GROUPS]

    def by_arm(self) -> list[tuple[str, list[float]]]:
        """Every arm with its temperatures, in order."""
        return [(arm, self.temperatures(arm)) for arm in dict.fromkeys(arm for arm, _ in self.settings)]

    def temperatures(self, arm: str) -> list[float]:
        return [temperature for name, temperature in self.settings if name == arm]

    def cell(self, arm: str, temperature: float, scope: str) -> Cell | None:
        return self.cells.get((arm, temperature, scope))

    def number(self, value: float) -> str:
        """A value as this benchmark writes it: "61" (percent) or "1.25"."""
        return (f"{100 * value:.0f}" if self.is_share else f"{value:.2f}").replace("-", MINUS)

    def signed(self, value: float) -> str:
        text = f"{100 * value:+.0f}" if self.is_share else f"{value:+.2f}"
        return "0" if text in ("+0", "-0") else text.replace("-", MINUS)


def boards(results: pl.DataFrame, arms: Sequence[str], codes: Sequence[str]) -> list[Board]:
    """One board per benchmark, those seen in tuning first; arms in the given order after the base, languages
    as in `codes`.
    """
    found = []
    for benchmark in sorted(results["benchmark"].unique().to_list(), key=lambda name: (len(name), name)):
        metrics = _metrics(results.filter(pl.col("benchmark") == benchmark))
        decisive = headline(benchmark)
        cells = {
            key: Cell(
                of[decisive][0],
                _interval(of, "difference"),
                _interval(of, "difference-to-best-base"),
                of[decisive][1],
                _value(of, "difference-p-holm"),
                _value(of, "prompts-to-resolve"),
            )
            for key, of in metrics.items()
            if decisive in of
        }
        if cells:  # what has no share of good completions and no mean score is shown by `other`
            best = {key[2]: key[1] for key, of in metrics.items() if "best-temperature" in of}
            found.append(board_of(benchmark, cells, arms, codes, best))
    return found


def arena_board(results: pl.DataFrame, arms: Sequence[str], codes: Sequence[str]) -> Board | None:
    """The win rates against the base as a board: their difference is that from a half."""
    cells = {}
    for key, of in _metrics(results.filter(pl.col("benchmark") == ARENA)).items():
        if "win-rate" in of:
            value, num_prompts = of["win-rate"]
            over = Interval(*(end - 0.5 for end in value))
            tests = (_value(of, "win-rate-p-holm"), _value(of, "prompts-to-resolve"))
            cells[key] = Cell(value, over, None, num_prompts, *tests)
    return board_of(ARENA, cells, arms, codes, {}) if cells else None


Metrics = Mapping[str, tuple[Interval, int]]


def _metrics(part: pl.DataFrame) -> dict[tuple[str, float, str], dict[str, tuple[Interval, int]]]:
    """The metrics of one benchmark by (arm, temperature, language or group)."""
    values: dict[tuple[str, float, str], dict[str, tuple[Interval, int]]] = {}
    columns = part.select("arm", "temperature", "language", "metric", "value", "ci_low", "ci_high", "n")
    for arm, temperature, scope, metric, value, low, high, num_prompts in columns.iter_rows():
        values.setdefault((arm, temperature, scope), {})[metric] = (Interval(value, low, high), num_prompts)
    return values


def board_of(
    benchmark: str,
    cells: Mapping[tuple[str, float, str], Cell],
    arms: Sequence[str],
    codes: Sequence[str],
    best: Mapping[str, float],
) -> Board:
    """Cells in the order that tables show them: the base, the arms, groups, languages."""
    order = {name: place for place, name in enumerate([BASE, *arms])}
    scope_order = {name: place for place, name in enumerate([*GROUPS, *codes])}
    settings = sorted({key[:2] for key in cells}, key=lambda s: (order.get(s[0], len(order)), s))
    scopes = sorted({key[2] for key in cells}, key=lambda s: (scope_order.get(s, len(scope_order)), s))
    groups = [scope for scope in scopes if scope in GROUPS]
    if len(groups) == 2 and all(
        cells[arm, t, "all"].value == cells[arm, t, groups[0]].value for arm, t in settings
    ):
        scopes.remove("all")  # of a single group it says nothing new
    return Board(benchmark, settings, scopes, cells, best)


def mode_shares(results: pl.DataFrame, benchmark: str) -> dict[tuple[str, float, str], dict[str, float]]:
    """The share of each mode, by (arm, temperature, language or group)."""
    rows = results.filter((pl.col("benchmark") == benchmark) & pl.col("metric").str.starts_with("mode:"))
    found: dict[tuple[str, float, str], dict[str, float]] = {}
    for arm, temperature, scope, metric, value in rows.select(
        "arm", "temperature", "language", "metric", "value"
    ).iter_rows():
        found.setdefault((arm, temperature, scope), {})[metric.removeprefix("mode:")] = value
    return found


def _interval(metrics: Metrics, name: str) -> Interval | None:
    return metrics[name][0] if name in metrics else None


def _value(metrics: Metrics, name: str) -> float | None:
    return metrics[name][0].value if name in metrics else None


def temperature_name(temperature: float) -> str:
    """ "greedy" for 0, else "T = 0.7"."""
    return "greedy" if temperature == 0 else f"T = {temperature:g}"


def scope_name(scope: str) -> str:
    """A group as it is, a language with its English name."""
    return scope if scope in GROUPS else languages.name(scope)


def count_of(count: int, unit: str) -> str:
    """ "1 pair", "1,024 pairs"."""
    return f"{count:,} {unit}" if count == 1 else f"{count:,} {unit}s"


def duration(seconds: float) -> str:
    """ "48 s", "3 min 20 s", "5 h 12 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def sentence(board: Board, arm: str, to_best: bool = False) -> str:
    """One sentence: in which groups the arm is better than the base, worse, or not told apart from it.

    A group counts as better or worse when every temperature says so, and as mixed when they disagree. With
    `to_best` the rival is the base at its best temperature.
    """
    clauses: dict[str, list[str]] = {"better": [], "mixed": [], "not resolved": [], "worse": []}
    for scope in board.groups:
        if scope == "all" and len(board.groups) > 1:
            continue
        found = {}
        for temperature in sorted(board.temperatures(arm), reverse=True):
            cell = board.cell(arm, temperature, scope)
            difference = None if cell is None else (cell.to_best if to_best else cell.difference)
            if difference is not None:
                found[temperature] = difference
        if found:
            verdicts = {verdict(difference) for difference in found.values()}
            numbers = ", ".join(
                f"{board.signed(d.value)} {'greedy' if t == 0 else f'at T = {t:g}'}" for t, d in found.items()
            )
            clauses[verdicts.pop() if len(verdicts) == 1 else "mixed"].append(f"{scope} ({numbers})")
    words = {
        "better": "better on",
        "mixed": "mixed on",
        "not resolved": "not resolved on",
        "worse": "worse on",
    }
    parts = [f"{words[kind]} {enumerate_words(scopes)}" for kind, scopes in clauses.items() if scopes]
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else "Not compared with the base."


def enumerate_words(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def interval_text(board: Board, interval: Interval, signed: bool = False) -> str:
    """ "61 [58, 64]"."""
    write = board.signed if signed else board.number
    return f"{write(interval.value)} [{write(interval.low)}, {write(interval.high)}]"
