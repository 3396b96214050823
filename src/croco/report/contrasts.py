"""What a comparison of a study comes to in the runs of all seeds: a difference, its error, and its tests.

Every comparison is a sum of weighted means: one arm minus another, a difference of differences, a gain minus a share of
another gain. Two sweeps at equal x are read off their curves: the base and the sweep's points, without those that
another point beats in both, linear in between, at the highest x that both reach. Such a value is linearised for its
error; the points of a curve are chosen on the very test prompts, for both sweeps alike."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from croco.config.study import BASE, Comparison
from croco.errors import UserError
from croco.report.multi_seed import Pooled, Setting
from croco.report.table import PERCENT, SCORE, temperature_name
from croco.stages.evaluate.stats import ALPHA, Estimate, Interval, over_seeds_and_prompts

KL = "kl"
Weights = dict[tuple[str, Setting], float]  # (benchmark, arm at a temperature) -> weight
Curve = list[tuple[float, Interval]]


@dataclass(frozen=True)
class Runs:
    """The runs of all seeds of one study."""

    pooled: Mapping[str, Pooled]  # benchmark -> values
    sweeps: Mapping[str, Sequence[str]] = field(default_factory=dict)  # sweep -> its arms
    # arm -> language -> nats a completion
    kl: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def kl_of(self, arm: str, scope: str) -> float:
        """How far an arm has gone from the base, the mean over a scope's languages."""
        codes = next(iter(self.pooled.values())).groups.get(scope, [scope])
        return 0.0 if arm == BASE else float(np.mean([self.kl[arm][code] for code in codes]))


@dataclass(frozen=True)
class Test:
    """A comparison on one scope at one temperature."""

    comparison: Comparison
    scope: str
    temperature: float
    words: str  # what is subtracted from what
    estimate: Estimate
    by_seed: list[float]
    p_wanted: float  # one-sided, that the difference is not beyond the border in the wanted direction
    p_equivalent: float  # that it is not within the equivalence margin (two one-sided tests)
    curves: Mapping[str, Curve] = field(default_factory=dict)  # of two sweeps at equal x

    @property
    def equivalent(self) -> bool:
        return self.p_equivalent <= ALPHA

    @property
    def reach(self) -> float:
        """How far the whole 95 % interval lies in the wanted direction; −inf where there is none."""
        interval = self.estimate.interval()
        end = interval.low if self.comparison.want in ("higher", "not lower") else -interval.high
        return -math.inf if math.isnan(end) else end


def run_tests(comparison: Comparison, runs: Runs, equivalence: float) -> list[Test]:
    """One test per scope and temperature; raises UserError where a benchmark has no results."""
    for name in (comparison.benchmark, comparison.at_equal or KL):
        if name != KL and name not in runs.pooled:
            known = ", ".join(runs.pooled)
            raise UserError(f"'{name}' of a claim has no results, expected one of {known}")
    pooled = runs.pooled[comparison.benchmark]
    arms = runs.sweeps[comparison.arm] if comparison.at_equal else [comparison.arm]
    return [
        _test(comparison, runs, equivalence, scope, temperature)
        for scope in comparison.on
        for temperature in comparison.temperatures or pooled.temperatures(arms[0])
    ]


def _test(comparison: Comparison, runs: Runs, equivalence: float, scope: str, temperature: float) -> Test:
    curves: dict[str, Curve] = {}
    if comparison.at_equal:
        value, weights, words, curves = _at_equal(comparison, runs, scope, temperature)
    else:
        weights, words = _difference(comparison, runs.pooled[comparison.benchmark], scope, temperature)
        value = None
    tables = [
        sum(weight * pooled.of(setting, scope, comparison.metric if name == comparison.benchmark else None)
            for (benchmark, setting), weight in weights.items() if benchmark == name)
        for name, pooled in runs.pooled.items() if any(benchmark == name for benchmark, _ in weights)
    ]  # fmt: skip
    estimate = over_seeds_and_prompts(*tables)
    by_seed = sum(np.asarray(table).mean(axis=1) for table in tables)
    if value is not None:
        by_seed, estimate = by_seed - estimate.value + value, estimate._replace(value=value)
    outside = max(estimate.p_above(-equivalence), 1 - estimate.p_above(equivalence))
    p_value = p_wanted(estimate, comparison.want, comparison.margin)
    return Test(
        comparison, scope, temperature, words, estimate, list(np.asarray(by_seed)), p_value, outside, curves
    )


def p_wanted(estimate: Estimate, want: str, margin: float) -> float:
    """One-sided p-value that a difference is not as wanted beyond its border.

    The border is `margin` for "higher" and "not higher", −`margin` for "lower" and "not lower"."""
    above = estimate.p_above(margin if want in ("higher", "not higher") else -margin)
    return above if want in ("higher", "not lower") else 1 - above


def _difference(
    comparison: Comparison, pooled: Pooled, scope: str, temperature: float
) -> tuple[Weights, str]:
    """Weights of the settings, and what is subtracted from what.

    The base's headline is at its best temperature; a mode's share ("mode:malformed") is compared at the same one: it
    shows what tuning moved, not decoding."""

    def named(arm: str, at_best: bool = False) -> tuple[Setting, str]:
        if at_best or (arm == BASE and comparison.metric is None):
            best = pooled.best(arm, scope)
            return best, f"{arm} ({temperature_name(best[1])})"
        return (arm, temperature), arm

    weights: Weights = defaultdict(float)

    def add(setting: Setting, weight: float) -> None:
        weights[comparison.benchmark, setting] += weight

    (arm, its_name), (than, than_name) = named(comparison.arm), named(comparison.than, comparison.at_best)
    add(arm, 1)
    add(than, -comparison.share)
    words = f"{its_name} − {than_name}"
    if comparison.share != 1:
        base, base_name = named(BASE)
        add(base, comparison.share - 1)
        words = f"gain of {its_name} over {base_name} − {100 * comparison.share:g} % of that of {than_name}"
    if comparison.beyond:
        (other, other_name), (rival, rival_name) = map(named, comparison.beyond)
        add(other, -1)
        add(rival, 1)
        words = f"({words}) − ({other_name} − {rival_name})"
    return weights, words


# Curves ---------------------------------------------------------------------------------------------------------------


def _at_equal(
    comparison: Comparison, runs: Runs, scope: str, temperature: float
) -> tuple[float, Weights, str, dict[str, Curve]]:
    """The difference of two sweeps at equal x, how it changes with every mean, its words, and both curves."""
    over, high = str(comparison.at_equal), runs.pooled[comparison.benchmark]

    def x_of(setting: Setting) -> float:
        if over == KL:
            return runs.kl_of(setting[0], scope)
        return float(runs.pooled[over].of(setting, scope).mean())

    frontiers, curves = list[list[Setting]](), dict[str, Curve]()
    heights: dict[Setting, float] = {}
    for sweep in (comparison.arm, comparison.than):
        settings = [(arm, temperature) for arm in dict.fromkeys((BASE, *runs.sweeps[sweep]))]
        points = []
        for setting in settings:
            table = high.of(setting, scope, comparison.metric)
            heights[setting] = float(table.mean())
            points.append((x_of(setting), over_seeds_and_prompts(table).interval()))
        curves[sweep] = sorted(points)
        frontiers.append([settings[i] for i in frontier([(x, y.value) for x, y in points], over == KL)])
    ends = [frontier_of_sweep[-1] for frontier_of_sweep in frontiers]
    end = min(ends, key=x_of)
    values, weights = list[float](), dict[tuple[str, Setting], float]()
    for sign, settings in zip((1, -1), frontiers, strict=True):
        value, of_point, slope = curve_at([(x_of(s), heights[s]) for s in settings], x_of(end))
        values.append(value)
        changes = [((comparison.benchmark, settings[i]), weight) for i, weight in of_point.items()]
        if over != KL:  # KL is taken as known
            changes += [((over, settings[i]), -slope * weight) for i, weight in of_point.items()]
            changes.append(((over, end), slope))
        for term, change in changes:
            weights[term] = weights.get(term, 0.0) + sign * change
    at = (SCORE if over == KL or not runs.pooled[over].is_share else PERCENT).text(x_of(end))
    return (
        values[0] - values[1],
        weights,
        f"{comparison.arm} − {comparison.than} at equal {over} ({at})",
        curves,
    )


def frontier(points: Sequence[tuple[float, float]], less: bool) -> list[int]:
    """Places of the points that no other beats, by x: more y is better, and more x, or `less`."""
    towards = -1 if less else 1

    def beaten(i: int) -> bool:
        (x, y) = points[i]
        return any(
            towards * (a - x) >= 0 and b >= y and ((a, b) != (x, y) or j < i) and j != i
            for j, (a, b) in enumerate(points)
        )

    return sorted((i for i in range(len(points)) if not beaten(i)), key=lambda i: points[i][0])


def curve_at(points: Sequence[tuple[float, float]], x: float) -> tuple[float, dict[int, float], float]:
    """Height of a curve at x, linear between its points and flat beyond them; its points' weights there; its slope."""
    for right, (place, height) in enumerate(points):
        if x <= place:
            if right == 0:
                break
            before, lower = points[right - 1]
            share, slope = (x - before) / (place - before), (height - lower) / (place - before)
            return lower + share * (height - lower), {right - 1: 1 - share, right: share}, slope
    nearest = 0 if x <= points[0][0] else len(points) - 1
    return points[nearest][1], {nearest: 1.0}, 0.0
