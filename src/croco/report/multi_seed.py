"""The verdicts of all seeds as one array per benchmark, and intervals over seeds and prompts from it.

Every seed answered the same test prompts, so that differences of two arms are paired in both. A language's value of a
prompt is the mean over samples, a group's the mean over its languages.

Shapes: S seeds, A settings (arm and temperature), P prompts, L languages, M metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from croco.errors import UserError
from croco.stages.evaluate.results import BASE, headline
from croco.stages.evaluate.stats import Interval, bootstrap_seeds, of_enough, percentiles, resampled_means
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
    resamples: int

    @property
    def headline(self) -> str:
        return headline(self.benchmark)

    @property
    def is_share(self) -> bool:
        return self.headline == "good"

    @property
    def num_seeds(self) -> int:
        return int(self.values.shape[0])

    @property
    def num_prompts(self) -> int:
        return int(self.values.shape[2])

    @property
    def main_groups(self) -> list[str]:
        """The groups that hold languages, without that of all."""
        return [name for name, codes in self.groups.items() if codes and name != "all"]

    def settings_of(self, arms: Sequence[str]) -> list[Setting]:
        """The arms' settings, in the order of the arms."""
        return [(arm, temperature) for arm in arms for temperature in self.temperatures(arm)]

    def of(self, setting: Setting, scope: str, metric: str | None = None) -> Array:
        """One value per seed and prompt, (S, P'): the mean over the scope's languages; prompts without any are out."""
        members = [code for code in self.groups.get(scope, [scope]) if code in self.languages]
        places = [self.languages.index(code) for code in members]
        column = self.metrics.index(metric or self.headline)
        values = self.values[:, self.settings.index(setting)][:, :, places, column]
        answered = ~np.isnan(values).all(axis=(0, 2))
        return np.asarray(np.nanmean(values[:, answered], axis=2))

    def mean(self, setting: Setting, scope: str, metric: str | None = None) -> Interval:
        """A setting's mean with its interval over seeds and prompts."""
        return bootstrap_seeds(self.of(setting, scope, metric), 0, self.resamples)

    def difference(
        self, one: Setting, other: Setting, scope: str, metric: str | None = None
    ) -> tuple[Interval, float]:
        """How far one setting is above another, paired by seed and prompt, and the standard error of that."""
        values = self.of(one, scope, metric) - self.of(other, scope, metric)
        resampled = resampled_means(values, 0, self.resamples)
        low, high = percentiles(resampled)
        interval = Interval(float(values.mean()), float(low), float(high))
        return of_enough(interval, values.shape[1]), float(resampled.std())

    def by_seed(self, one: Setting, other: Setting, scope: str, metric: str | None = None) -> list[float]:
        """The difference in every seed alone, (S,)."""
        return list((self.of(one, scope, metric) - self.of(other, scope, metric)).mean(axis=1))

    def best(self, arm: str, scope: str) -> Setting:
        """The arm at the temperature with the highest mean of the headline; the lowest of equals."""
        of_arm = [setting for setting in self.settings if setting[0] == arm]
        return max(of_arm, key=lambda setting: (self.of(setting, scope).mean(), -setting[1]))

    def temperatures(self, arm: str) -> list[float]:
        return sorted(temperature for name, temperature in self.settings if name == arm)


def pool(
    seeds: Sequence[Path], arms: Sequence[str], groups: Mapping[str, Sequence[str]], resamples: int
) -> dict[str, Pooled]:
    """Every benchmark of the runs of several seeds, on the prompts that all of them answered in every arm.

    Raises UserError where two seeds share no prompt: nothing is averaged over unequal sets.
    """
    frames = []
    for number, folder in enumerate(seeds):
        verdicts = pl.concat([read_table(folder / "evaluate" / arm, COLUMNS) for arm in [BASE, *arms]])
        frames.append(verdicts.with_columns(seed=pl.lit(number)))
    every = pl.concat(frames)
    return {
        str(benchmark): _pooled(str(benchmark), part, len(seeds), groups, resamples)
        for (benchmark,), part in every.group_by("benchmark", maintain_order=True)
    }


def _pooled(
    benchmark: str,
    verdicts: pl.DataFrame,
    num_seeds: int,
    groups: Mapping[str, Sequence[str]],
    resamples: int,
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
    return Pooled(benchmark, values, settings, languages, metrics, groups, resamples)


def _places(values: Sequence[object], order: Sequence[object]) -> NDArray[np.int64]:
    number = {value: place for place, value in enumerate(order)}
    return np.array([number[value] for value in values], dtype=np.int64)
