"""The verdicts of all seeds as one array per benchmark, and estimates over seeds and prompts from it.

Every seed answered the same test prompts, so that differences of two arms are paired in both. A language's value of a
prompt is the mean over samples, a group's the mean over its languages.

Shapes: S seeds, A settings (arm and temperature), P prompts, L languages, M metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from croco.errors import UserError
from croco.report.scores import Board, Cell, Key, board_of
from croco.report.table import PERCENT, SCORE, Unit
from croco.stages.evaluate.results import BASE, headline
from croco.stages.evaluate.stats import Interval, over_seeds_and_prompts
from croco.storage.shards import read_table

COLUMNS = ["arm", "prompt_id", "language", "temperature", "benchmark", "mode", "value"]
KEY = ["arm", "temperature", "prompt_id", "language"]
Setting = tuple[str, float]  # arm and temperature
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pooled:
    """One benchmark: values (S, A, P, L, M), NaN where a language has no such prompt."""

    benchmark: str
    values: Array
    settings: list[Setting]
    languages: list[str]
    metrics: list[str]
    groups: Mapping[str, Sequence[str]]

    @property
    def headline(self) -> str:
        return headline(self.benchmark)

    @property
    def is_share(self) -> bool:
        return self.headline == "good"

    @property
    def unit(self) -> Unit:
        return PERCENT if self.is_share else SCORE

    @property
    def main_groups(self) -> list[str]:
        """The groups that hold languages, without that of all."""
        return [name for name, codes in self.groups.items() if codes and name != "all"]

    def temperatures(self, arm: str) -> list[float]:
        return sorted(temperature for name, temperature in self.settings if name == arm)

    def of(self, setting: Setting, scope: str, metric: str | None = None) -> Array:
        """One value per seed and prompt, (S, P'): the mean over the scope's languages; prompts without any are out."""
        members = [code for code in self.groups.get(scope, [scope]) if code in self.languages]
        places = [self.languages.index(code) for code in members]
        metric = metric or self.headline
        never = metric.startswith("mode:") and metric not in self.metrics  # a mode that no completion has
        if metric not in self.metrics and not never:
            known = ", ".join(self.metrics)
            raise UserError(f"'{metric}' is no metric of '{self.benchmark}', expected one of {known}")
        column = 0 if never else self.metrics.index(metric)
        values = self.values[:, self.settings.index(setting)][:, :, places, column]
        answered = ~np.isnan(values).all(axis=(0, 2))
        return np.asarray(np.nanmean(values[:, answered], axis=2)) * (0.0 if never else 1.0)

    def mean(self, setting: Setting, scope: str) -> Interval:
        """A setting's mean of the headline with its interval over seeds and prompts."""
        return over_seeds_and_prompts(self.of(setting, scope)).interval()

    def difference(self, one: Setting, other: Setting, scope: str) -> Interval:
        """How far one setting is above another, paired by seed and prompt."""
        return over_seeds_and_prompts(self.of(one, scope) - self.of(other, scope)).interval()

    def board(self, arms: Sequence[str]) -> Board:
        """The arms as the report of one run has them, with intervals over seeds and prompts."""
        cells, metrics = dict[Key, Cell](), dict[Key, dict[str, tuple[Interval, int]]]()
        groups = [name for name, codes in self.groups.items() if set(codes) & set(self.languages)]
        scopes = [*groups, *self.languages]
        best = {scope: self.best(BASE, scope) for scope in scopes}
        modes = [metric for metric in self.metrics if metric != self.headline]
        for setting in (
            (arm, temperature) for arm in [BASE, *arms] for temperature in self.temperatures(arm)
        ):
            for scope in scopes:
                same, difference = (BASE, setting[1]), None
                if setting[0] != BASE and same in self.settings:
                    difference = self.difference(setting, same, scope)
                to_best = None if setting[0] == BASE else self.difference(setting, best[scope], scope)
                num_prompts = self.of(setting, scope).shape[1]
                cells[*setting, scope] = Cell(self.mean(setting, scope), difference, to_best, num_prompts)
                shares = {mode: float(self.of(setting, scope, mode).mean()) for mode in modes}
                metrics[*setting, scope] = {
                    mode: (Interval(*[s] * 3), num_prompts) for mode, s in shares.items()
                }
        temperatures = {scope: setting[1] for scope, setting in best.items()}
        return board_of(self.benchmark, cells, arms, self.languages, temperatures, metrics)

    def best(self, arm: str, scope: str) -> Setting:
        """The arm at the temperature with the highest mean of the headline; the lowest of equals."""
        of_arm = [setting for setting in self.settings if setting[0] == arm]
        return max(of_arm, key=lambda setting: (self.of(setting, scope).mean(), -setting[1]))


def pool(
    seeds: Sequence[Path], arms: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> dict[str, Pooled]:
    """Every benchmark of the runs of several seeds, on the prompts that all of them answered in every arm.

    Raises UserError where two seeds share no prompt: nothing is averaged over unequal sets."""
    frames = []
    for number, folder in enumerate(seeds):
        verdicts = pl.concat([read_table(folder / "evaluate" / arm, COLUMNS) for arm in [BASE, *arms]])
        frames.append(verdicts.with_columns(seed=pl.lit(number)))
    every = pl.concat(frames)
    return {
        str(benchmark): _pooled(str(benchmark), part, len(seeds), groups)
        for (benchmark,), part in every.group_by("benchmark", maintain_order=True)
    }


def _pooled(
    benchmark: str, verdicts: pl.DataFrame, num_seeds: int, groups: Mapping[str, Sequence[str]]
) -> Pooled:
    modes = verdicts["mode"].unique().sort().to_list()
    metrics = [headline(benchmark), *(f"mode:{mode}" for mode in modes)]
    cells = verdicts.group_by("seed", *KEY).agg(
        pl.col("value").mean().alias(metrics[0]),
        *((pl.col("mode") == mode).mean().alias(f"mode:{mode}") for mode in modes),
    )
    settings = sorted(cells.select("arm", "temperature").unique().rows())
    prompt = ["prompt_id", "language"]
    common = cells.group_by(prompt).len().filter(pl.col("len") == num_seeds * len(settings)).select(prompt)
    if common.is_empty():
        raise UserError(f"no prompt of '{benchmark}' was evaluated in every arm under every seed")
    cells = cells.join(common, on=prompt)
    prompts = common["prompt_id"].unique().sort().to_list()
    languages = [code for code in groups["all"] if code in common["language"]]
    values = np.full((num_seeds, len(settings), len(prompts), len(languages), len(metrics)), np.nan)
    places = [
        cells["seed"].to_numpy(),
        _places(cells.select("arm", "temperature").rows(), settings),
        _places(cells["prompt_id"].to_list(), prompts),
        _places(cells["language"].to_list(), languages),
    ]
    values[tuple(places)] = cells.select(metrics).to_numpy()
    return Pooled(benchmark, values, settings, languages, metrics, groups)


def _places(values: Sequence[object], order: Sequence[object]) -> NDArray[np.int64]:
    number = {value: place for place, value in enumerate(order)}
    return np.array([number[value] for value in values], dtype=np.int64)
