"""What becomes of a claim: every comparison it consists of, with its interval, and the verdict over all of them.

A comparison holds when its whole interval says so, does not when its whole interval says the contrary, and is not
resolved otherwise. A claim that needs all its comparisons fails with one of them; one that needs most, with half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from croco.evaluation.stats import Interval
from croco.recipe_study import Claim, Comparison
from croco.study.pooled import Pooled

HOLDS, FAILS, OPEN = "holds", "does not hold", "not resolved"


@dataclass(frozen=True)
class Tested:
    """A comparison on one scope at one temperature: the difference over seeds and prompts, and each seed's."""

    comparison: Comparison
    scope: str
    temperature: float
    rival: tuple[str, float]
    difference: Interval
    by_seed: list[float]
    verdict: str


def judge(claim: Claim, pooled: Mapping[str, Pooled]) -> tuple[str, list[Tested]]:
    """The verdict on a claim and the tests it rests on."""
    tests = [test for comparison in claim.tests for test in _tests(comparison, pooled[comparison.benchmark])]
    holds = sum(test.verdict == HOLDS for test in tests)
    fails = sum(test.verdict == FAILS for test in tests)
    needed = len(tests) if claim.need == "all" else len(tests) // 2 + 1
    if holds >= needed:
        return HOLDS, tests
    return (FAILS if fails > len(tests) - needed else OPEN), tests


def _tests(comparison: Comparison, pooled: Pooled) -> list[Tested]:
    found = []
    for scope in comparison.on:
        for temperature in comparison.temperatures or pooled.temperatures(comparison.arm):
            mine, metric = (comparison.arm, temperature), comparison.metric
            rival = (comparison.than, temperature)
            if comparison.at_best:
                rival = pooled.best(comparison.than, scope, metric)
            difference = pooled.difference(mine, rival, scope, metric)
            seeds = pooled.by_seed(mine, rival, scope, metric)
            verdict = decide(difference, comparison.want, comparison.margin)
            found.append(Tested(comparison, scope, temperature, rival, difference, seeds, verdict))
    return found


def decide(difference: Interval, want: str, margin: float) -> str:
    """Whether an interval says that a difference is as wanted, by at least (for "not": at most) the margin."""
    low, high = difference.low, difference.high
    if want in ("lower", "not higher"):
        low, high = -high, -low
    border = margin if want in ("higher", "lower") else -margin
    if low > border:
        return HOLDS
    return FAILS if high < border else OPEN
