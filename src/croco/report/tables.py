"""The tables people read: arms by groups of languages, arms by language, one sentence per arm, and all of it
as Markdown.

Pure arrangements of the results table; the page, the terminal and the Markdown export print the same numbers
because they take them from here. Shares are shown as whole percentages and their differences as points;
scores with two decimals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from croco import languages
from croco.evaluation.results import BASE, GROUPS, headline
from croco.evaluation.stats import Interval, verdict
from croco.store import read_json, read_table

TITLES = {
    "lab": "Tasks seen in tuning",
    "lab-held-out-task": "Task kept out of tuning",
    "reward": "Reward model's score",
}
MINUS = "−"


@dataclass(frozen=True)
class Cell:
    """One arm at one temperature in one language or group; differences are null for the base."""

    value: Interval
    difference: Interval | None
    to_best: Interval | None
    num_prompts: int


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
        return headline(self.benchmark) == "good"

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
    order = {name: place for place, name in enumerate([BASE, *arms])}
    scope_order = {name: place for place, name in enumerate([*GROUPS, *codes])}
    found = []
    for benchmark in sorted(results["benchmark"].unique().to_list(), key=lambda name: (len(name), name)):
        part = results.filter(pl.col("benchmark") == benchmark)
        values: dict[tuple[str, float, str], dict[str, tuple[Interval, int]]] = {}
        columns = part.select("arm", "temperature", "language", "metric", "value", "ci_low", "ci_high", "n")
        for arm, temperature, scope, metric, value, low, high, num_prompts in columns.iter_rows():
            values.setdefault((arm, temperature, scope), {})[metric] = (
                Interval(value, low, high),
                num_prompts,
            )
        metric = headline(benchmark)
        cells = {
            key: Cell(metrics[metric][0], _interval(metrics, "difference"),
                      _interval(metrics, "difference-to-best-base"), metrics[metric][1])
            for key, metrics in values.items() if metric in metrics
        }  # fmt: skip
        settings = sorted({key[:2] for key in cells}, key=lambda s: (order.get(s[0], len(order)), s))
        scopes = sorted({key[2] for key in cells}, key=lambda s: (scope_order.get(s, len(scope_order)), s))
        if len([scope for scope in scopes if scope in GROUPS]) == 2:
            scopes.remove("all")  # of a single group it says nothing new
        best = {key[2]: key[1] for key, metrics in values.items() if "best-temperature" in metrics}
        found.append(Board(benchmark, settings, scopes, cells, best))
    return found


def mode_shares(results: pl.DataFrame, benchmark: str) -> dict[tuple[str, float, str], dict[str, float]]:
    """The share of each mode, by (arm, temperature, language or group)."""
    rows = results.filter((pl.col("benchmark") == benchmark) & pl.col("metric").str.starts_with("mode:"))
    found: dict[tuple[str, float, str], dict[str, float]] = {}
    for arm, temperature, scope, metric, value in rows.select(
        "arm", "temperature", "language", "metric", "value"
    ).iter_rows():
        found.setdefault((arm, temperature, scope), {})[metric.removeprefix("mode:")] = value
    return found


def _interval(metrics: Mapping[str, tuple[Interval, int]], name: str) -> Interval | None:
    return metrics[name][0] if name in metrics else None


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
    parts = [f"{words[kind]} {_enumerate(scopes)}" for kind, scopes in clauses.items() if scopes]
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else "Not compared with the base."


def _enumerate(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def results_markdown(run_folder: Path) -> str:
    """The main tables of a run as Markdown: one sentence per arm, arms by groups, arms by language; 95 %
    intervals.
    """
    from croco.recipe import load

    recipe = load(run_folder / "recipe.json")
    results = read_table(run_folder / "results")
    made = read_json(run_folder / "results" / "stage.json")
    versions = ", ".join(f"{name} {version}" for name, version in made["libraries"].items())
    parts = [
        f"# {recipe.run.name}\n\nMade by `croco run` and `croco report {recipe.folder} --markdown FILE`, never "
        f"by hand. {made['machine']}; {versions}.\n"
    ]
    for board in boards(results, list(recipe.arms), recipe.run.evaluated):
        num_prompts = max(cell.num_prompts for cell in board.cells.values())
        unit = "percent of completions that are good" if board.is_share else "mean score"
        parts.append(f"### {board.title}\n\nIn {unit}; {num_prompts} prompts, 95 % intervals over prompts.\n")
        parts.append("\n".join(f"- **{arm}**: {sentence(board, arm)}" for arm in recipe.arms) + "\n")
        parts.append(_markdown_table(board, board.groups, differences=False))
        parts.append("Differences from the base at the same temperature, and from the base at its best temperature ("
                     + ", ".join(f"{scope}: {temperature_name(board.best_base[scope])}" for scope in board.groups
                                 if scope in board.best_base) + "):\n")  # fmt: skip
        parts.append(_markdown_table(board, board.groups, differences=True))
        parts.append(_markdown_table(board, board.languages, differences=False))
        parts.append(_mode_table(board, mode_shares(results, board.benchmark)))
    return "\n".join(parts)


def _markdown_table(board: Board, scopes: Sequence[str], differences: bool) -> str:
    head = ["arm", "decoding", *scopes]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * len(scopes)]
    for arm, temperature in board.settings:
        cells = [board.cell(arm, temperature, scope) for scope in scopes]
        if differences and arm == BASE:
            continue
        texts = [_difference_text(board, cell) if differences else _value_text(board, cell) for cell in cells]
        lines.append("| " + " | ".join([arm, temperature_name(temperature), *texts]) + " |")
    return "\n".join(lines) + "\n"


def _mode_table(board: Board, shares: Mapping[tuple[str, float, str], Mapping[str, float]]) -> str:
    """Where the mass went: percent of completions in each mode, per group."""
    modes = sorted({mode for found in shares.values() for mode in found})
    lines = [
        "Percent of completions in each mode:\n",
        "| arm | decoding | group | " + " | ".join(modes) + " |",
    ]
    lines.append("|---|---|---|" + "---:|" * len(modes))
    for arm, temperature in board.settings:
        for scope in (scope for scope in board.groups if scope != "all"):
            found = shares.get((arm, temperature, scope), {})
            cells = [f"{100 * found.get(mode, 0.0):.0f}" for mode in modes]
            lines.append("| " + " | ".join([arm, temperature_name(temperature), scope, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _value_text(board: Board, cell: Cell | None) -> str:
    return "" if cell is None else interval_text(board, cell.value)


def _difference_text(board: Board, cell: Cell | None) -> str:
    if cell is None:
        return ""
    shown = [interval_text(board, d, signed=True) for d in (cell.difference, cell.to_best) if d is not None]
    return " / ".join(shown)


def interval_text(board: Board, interval: Interval, signed: bool = False) -> str:
    """ "61 [58, 64]"."""
    write = board.signed if signed else board.number
    return f"{write(interval.value)} [{write(interval.low)}, {write(interval.high)}]"
