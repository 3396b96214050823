"""The scores that people read: arms by groups of languages and by language, and one sentence per arm.

Pure arrangements of the results table; the page, the terminal and the exports print the same numbers because they take
them from here. Shares are shown as whole percentages and their differences as points; scores with two decimals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import polars as pl

from croco.config.recipe import Recipe
from croco.report.load_run import Run
from croco.report.table import (
    PERCENT,
    POINTS,
    SCORE,
    SCORE_CHANGE,
    Entry,
    Number,
    Table,
    Unit,
    numbers,
    temperature_name,
)
from croco.stages.evaluate.results import BASE, GROUPS, headline
from croco.stages.evaluate.stats import Interval, interval, verdict
from croco.storage.provenance import without_folders

TITLES = {
    "lab": "Tasks seen in tuning",
    "lab-held-out-task": "Task kept out of tuning",
    "lab-abilities": "Other abilities, never tuned",
    "reward": "Score of a reward model",
    "arena": "Judged against the base",
}
ARENA, REWARD = "arena", "reward"
Key = tuple[str, float, str]  # arm, temperature, language or group
# metric -> its interval, and the prompts it rests on
Metrics = Mapping[Key, Mapping[str, tuple[Interval, int]]]


@dataclass(frozen=True)
class Cell:
    """One arm at one temperature in one language or group; differences are null for the base."""

    value: Interval
    difference: Interval | None
    to_best: Interval | None
    num_prompts: int
    holm: float | None = None  # the difference's p-value, adjusted over all languages and arms
    needed: float | None = None  # prompts that would resolve it

    @property
    def remark(self) -> str:
        """What the tests add to the difference: its adjusted p-value, the prompts that would settle it."""
        words = [] if self.holm is None else [f"p = {self.holm:.3g} (Holm)"]
        if self.needed is not None and self.difference and verdict(self.difference) == "not resolved":
            words.append(f"about {self.needed:,.0f} prompts would resolve it")
        return "; ".join(words)


@dataclass(frozen=True)
class Board:
    """All cells of one benchmark. `settings` are (arm, temperature), the base first; `scopes` groups and languages."""

    benchmark: str
    settings: list[tuple[str, float]]
    scopes: list[str]
    cells: Mapping[Key, Cell]
    best_base: Mapping[str, float]  # scope -> the temperature at which the base did best
    metrics: Metrics = field(default_factory=dict)
    scorer: str = ""  # whose score it is, where a reward model's

    @property
    def title(self) -> str:
        title = TITLES.get(self.benchmark, self.benchmark)
        return f"{title}, by {self.scorer}" if self.scorer else title

    @property
    def is_share(self) -> bool:
        return self.benchmark == ARENA or headline(self.benchmark) == "good"

    @property
    def measure(self) -> str:
        """What a value is; a share of good completions, unless they are graded."""
        if self.benchmark == ARENA:
            return "win rate in percent, ties a half"
        if not self.is_share:
            return "mean score"
        graded = any(
            abs(self.cells[key].value.value - (of["mode:good"][0].value if "mode:good" in of else 0)) > 1e-9
            for key, of in self.metrics.items()
            if key in self.cells and any(metric.startswith("mode:") and metric != "mode:" for metric in of)
        )
        return "mean quality in percent" if graded else "percent of completions that are good"

    @property
    def unit(self) -> Unit:
        return PERCENT if self.is_share else SCORE

    @property
    def change(self) -> Unit:
        """How a difference is written."""
        return POINTS if self.is_share else SCORE_CHANGE

    @property
    def groups(self) -> list[str]:
        return [scope for scope in self.scopes if scope in GROUPS]

    @property
    def main_groups(self) -> list[str]:
        """The groups without that of all languages, unless it is the only one."""
        return [scope for scope in self.groups if scope != "all"] or self.groups

    @property
    def languages(self) -> list[str]:
        return [scope for scope in self.scopes if scope not in GROUPS]

    @property
    def num_prompts(self) -> int:
        return max(cell.num_prompts for cell in self.cells.values())

    def temperatures(self, arm: str) -> list[float]:
        return [temperature for name, temperature in self.settings if name == arm]

    def cell(self, arm: str, temperature: float, scope: str) -> Cell | None:
        return self.cells.get((arm, temperature, scope))

    def entry(self, setting: tuple[str, float], scope: str, show: Sequence[str]) -> tuple[Number, ...]:
        """The numbers of a cell that `show` names among "value", "difference" and "to_best"; none where it has none."""
        if (cell := self.cell(*setting, scope)) is None:
            return ()
        numbers = []
        for name in show:
            if name == "value":
                best = setting[0] == BASE and self.best_base.get(scope) == setting[1]
                numbers.append(Number(cell.value, self.unit, note="best of the base" if best else ""))
            elif (difference := cell.difference if name == "difference" else cell.to_best) is not None:
                flags, note = (verdict(difference).replace(" ", "-"),), cell.remark
                note = note if name == "difference" else ""
                numbers.append(Number(difference, self.change, flags=flags, note=note))
        return tuple(numbers)


def arms_table(
    board: Board, scopes: Sequence[str], show: Sequence[str] = ("value",), title: str = "", base: bool = True
) -> Table:
    """Arms and temperatures as rows, groups or languages as columns."""
    rows: list[list[Entry]] = [
        [arm, temperature_name(t), *(board.entry((arm, t), scope, show) for scope in scopes)]
        for arm, t in board.settings
        if base or arm != BASE
    ]
    return Table(["arm", "decoding", *scopes], rows, 2, title)


def mark_best(entries: Sequence[Entry]) -> list[Entry]:
    """The entries with the highest first number flagged as "best", as printed; none where all print the same."""
    first = [stacked[0] for entry in entries if (stacked := numbers(entry))]
    if len({number.text for number in first}) < 2:
        return list(entries)
    best = max(first, key=lambda number: number.interval.value).text
    return [
        (replace(stacked[0], flags=(*stacked[0].flags, "best")), *stacked[1:])
        if (stacked := numbers(entry)) and stacked[0].text == best
        else entry
        for entry in entries
    ]


def metrics_of(results: pl.DataFrame) -> dict[str, dict[Key, dict[str, tuple[Interval, int]]]]:
    """Every row of the results by benchmark, (arm, temperature, language or group) and metric."""
    values: dict[str, dict[Key, dict[str, tuple[Interval, int]]]] = {}
    columns = ("benchmark", "arm", "temperature", "language", "metric", "value", "ci_low", "ci_high", "n")
    rows = results.select(columns).iter_rows()
    for benchmark, arm, temperature, scope, metric, value, low, high, n in rows:
        by_key = values.setdefault(benchmark, {})
        by_key.setdefault((arm, temperature, scope), {})[metric] = (interval(value, low, high), n)
    return values


def scorer_of(recipe: Recipe) -> str:
    """Whose score the answers have, and whether it is the one that picked the pairs; "" where none has scored them."""
    reward = recipe.evaluation_reward
    if reward is None:
        return ""
    ours = [(part.model, part.revision, part.function, part.weight) for part in reward.parts]
    picked = [(part.model, part.revision, part.function, part.weight) for part in recipe.reward.parts]
    pairs = any(recipe.arms[arm].scorer == "reward" for arm in recipe.evaluated_arms)
    name = " + ".join(without_folders(part.label) for part in reward.parts)
    return f"{name}, which picked the pairs too" if pairs and ours == picked else name


def boards_of(run: Run) -> list[Board]:
    recipe = run.recipe
    return boards(run.results, recipe.evaluated_arms, recipe.run.evaluated, scorer_of(recipe))


def boards(results: pl.DataFrame, arms: Sequence[str], codes: Sequence[str], scorer: str = "") -> list[Board]:
    """One board per benchmark, those seen in tuning first, the arena last; arms in the given order, languages as in
    `codes`.

    `scorer` is who gave the scores, as `scorer_of` says it. What has no share of good completions, no mean score and no
    win rate is shown by `diagnostics.py`."""
    made = []
    order = sorted(metrics_of(results).items(), key=lambda item: (item[0] == ARENA, len(item[0]), item[0]))
    for benchmark, metrics in order:
        cells = {key: cell for key, of in metrics.items() if (cell := _cell(benchmark, of)) is not None}
        if cells:
            best = {key[2]: key[1] for key, of in metrics.items() if "best-temperature" in of}
            board = board_of(benchmark, cells, arms, codes, best, metrics)
            made.append(replace(board, scorer=scorer if benchmark == REWARD else ""))
    return made


def _cell(benchmark: str, of: Mapping[str, tuple[Interval, int]]) -> Cell | None:
    """Of the metrics of an arm in a language or group; a win rate's difference is that from a half."""
    judged = benchmark == ARENA and "win-rate" in of
    decisive, tested = ("win-rate", "win-rate") if judged else (headline(benchmark), "difference")
    if decisive not in of:
        return None
    value, num_prompts = of[decisive]
    difference = of["difference"][0] if "difference" in of else None
    if judged:
        difference = Interval(*(end - 0.5 for end in value))
    to_best = of["difference-to-best-base"][0] if "difference-to-best-base" in of else None
    tests = (_value(of, f"{tested}-p-holm"), _value(of, "prompts-to-resolve"))
    return Cell(value, difference, to_best, num_prompts, *tests)


def board_of(
    benchmark: str,
    cells: Mapping[Key, Cell],
    arms: Sequence[str],
    codes: Sequence[str],
    best: Mapping[str, float],
    metrics: Metrics | None = None,
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
    return Board(benchmark, settings, scopes, cells, best, metrics or {})


def _value(metrics: Mapping[str, tuple[Interval, int]], name: str) -> float | None:
    return metrics[name][0].value if name in metrics else None
