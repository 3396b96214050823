"""Judges a claim by its comparisons: one rule, the same in both directions.

A comparison has a two-sided test of its difference against the border that its `want` and `margin` name. A claim
holds when enough of its comparisons are significant as wanted, does not hold when as many are significant to the
contrary (intersection-union; for "most" the partial conjunction of Benjamini and Heller 2008), both after Holm's
correction over the claims of its family. Else it is equivalent where as many comparisons lie within the study's
equivalence margin (two one-sided tests at 5 %: the 90 % interval), else not resolved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from croco.config.study import BASE, Claim, Comparison, Study
from croco.report.multi_seed import Pooled
from croco.report.table import (
    PERCENT,
    POINTS,
    SCORE_CHANGE,
    Entry,
    Number,
    Part,
    Table,
    count_of,
    temperature_name,
)
from croco.stages.evaluate.stats import ALPHA, Interval, holm

HOLDS, FAILS, EQUIVALENT, OPEN = "holds", "does not hold", "equivalent", "not resolved"
UNTESTABLE = "not testable here"


@dataclass(frozen=True)
class Test:
    """A comparison on one scope at one temperature."""

    comparison: Comparison
    scope: str
    temperature: float
    rival: tuple[str, float]
    difference: Interval  # 95 % over seeds and prompts
    by_seed: list[float]
    p_wanted: float  # one-sided, that the difference is not beyond the border in the wanted direction
    equivalent: bool  # whether the 90 % interval lies within the equivalence margin


@dataclass(frozen=True)
class Judged:
    """A claim with its tests, its p-value after Holm's correction and its verdict."""

    claim: Claim
    tests: list[Test]
    p_value: float | None  # None: not testable
    verdict: str


def judge_all(study: Study, pooled: Mapping[str, Pooled]) -> dict[str, Judged]:
    """Every claim of the study; primary and secondary claims are corrected apart, untestable ones not counted."""
    tests = {
        name: [
            test
            for comparison in claim.tests
            for test in run_tests(comparison, pooled[comparison.benchmark], study.equivalence)
        ]
        for name, claim in study.claims.items()
    }
    judged = {}
    for secondary in (False, True):
        names = [n for n, c in study.claims.items() if c.secondary == secondary and not c.not_testable]
        directions = [claim_p_values(study.claims[name], tests[name]) for name in names]
        adjusted = holm([min(1.0, 2 * min(both)) for both in directions])
        for name, both, p_value in zip(names, directions, adjusted, strict=True):
            claim = study.claims[name]
            verdict = OPEN
            if p_value <= ALPHA:
                verdict = HOLDS if both[0] < both[1] else FAILS
            elif sum(test.equivalent for test in tests[name]) >= needed(claim, tests[name]):
                verdict = EQUIVALENT
            judged[name] = Judged(claim, tests[name], p_value, verdict)
    return {
        name: judged.get(name, Judged(claim, tests[name], None, UNTESTABLE))
        for name, claim in study.claims.items()
    }


def needed(claim: Claim, tests: Sequence[Test]) -> int:
    """How many tests must agree."""
    return len(tests) if claim.need == "all" else len(tests) // 2 + 1


def claim_p_values(claim: Claim, tests: Sequence[Test]) -> tuple[float, float]:
    """One-sided p-values that fewer than the needed number of tests are as wanted, and to the contrary.

    (n − u + 1) · p₍ᵤ₎ for u needed of n (Benjamini and Heller 2008, Bonferroni form); with all needed the largest p.
    """
    u, n = needed(claim, tests), len(tests)
    wanted = sorted(test.p_wanted for test in tests)
    contrary = sorted(1 - test.p_wanted for test in tests)
    return min(1.0, (n - u + 1) * wanted[u - 1]), min(1.0, (n - u + 1) * contrary[u - 1])


def run_tests(comparison: Comparison, pooled: Pooled, equivalence: float) -> list[Test]:
    """One test per scope and temperature; `at_best` rivals, and the base's headline, at their best temperature.

    A mode's share ("mode:malformed") is compared at the same temperature: it shows what tuning moved, not decoding.
    """
    tests = []
    for scope in comparison.on:
        for temperature in comparison.temperatures or pooled.temperatures(comparison.arm):
            setting, rival = (comparison.arm, temperature), (comparison.than, temperature)
            if comparison.at_best or (comparison.than == BASE and comparison.metric is None):
                rival = pooled.best(comparison.than, scope)
            metric = comparison.metric
            difference, error = pooled.difference(setting, rival, scope, metric)
            p_value = p_wanted(difference.value, error, comparison.want, comparison.margin)
            within = abs(difference.value) + NormalDist().inv_cdf(1 - ALPHA) * error <= equivalence
            if not difference.known:  # too few prompts say nothing, in either direction
                p_value, within = 0.5, False
            by_seed = pooled.by_seed(setting, rival, scope, metric)
            tests.append(Test(comparison, scope, temperature, rival, difference, by_seed, p_value, within))
    return tests


def p_wanted(value: float, error: float, want: str, margin: float) -> float:
    """One-sided p-value that a difference is not as wanted beyond its border, by the normal approximation.

    The border is `margin` for "higher" and "lower", −`margin` for "not lower" and "not higher".
    """
    distance = value if want in ("higher", "not lower") else -value
    distance -= margin if want in ("higher", "lower") else -margin
    if error == 0:
        return 0.0 if distance > 0 else 1.0 if distance < 0 else 0.5
    return NormalDist().cdf(-distance / error)


def claims_parts(judged: Mapping[str, Judged], equivalence: float) -> list[Part]:
    """The verdicts, primary claims apart from secondary ones."""
    parts = []
    for secondary, name, title in (
        (False, "claims", "Claim by claim"),
        (True, "secondary", "Secondary claims"),
    ):
        family = [one for one in judged.values() if one.claim.secondary == secondary]
        counted = sum(one.p_value is not None for one in family)
        rows = [
            [one.claim.says, one.verdict, "" if one.p_value is None else p_text(one.p_value)]
            for one in family
        ]
        text = (
            f"A claim holds, or does not, where all comparisons that it needs are significant that way, at 5 % after "
            f"Holm's correction over {count_of(counted, 'claim')} (p in the table). It is equivalent where the "
            f"90 % intervals lie within ± {equivalence:g}. The base is at its best temperature."
        )
        if rows:
            parts.append(Part(name, title, [text], [Table(["claim", "in this study", "p"], rows, 2)]))
    return parts


def p_text(p_value: float) -> str:
    """ "0.03", "< 0.001"."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.2g}"


def claim_part(name: str, judged: Judged, pooled: Mapping[str, Pooled]) -> Part:
    """One claim: its comparisons, and why it came out so."""
    claim, rows = judged.claim, list[list[Entry]]()
    for test in judged.tests:
        one, benchmark = test.comparison, pooled[test.comparison.benchmark]
        share = benchmark.is_share or (one.metric or "").startswith("mode:")
        unit = POINTS if share else SCORE_CHANGE
        measure = (one.metric or benchmark.headline) + (
            f", {one.benchmark}" if one.benchmark != "lab" else ""
        )
        rows.append([
            one.arm, f"{test.rival[0]} ({temperature_name(test.rival[1])})", measure, test.scope,
            temperature_name(test.temperature), Number(test.difference, unit), ", ".join(map(unit.text, test.by_seed)),
            one.want + (f" by {PERCENT.text(one.margin)}" if one.margin and share else ""),
            p_text(min(1.0, 2 * min(test.p_wanted, 1 - test.p_wanted))), "yes" if test.equivalent else "",
        ])  # fmt: skip
    head = [
        "arm",
        "than",
        "measure",
        "on",
        "decoding",
        "difference",
        "each seed",
        "claimed",
        "p",
        "equivalent",
    ]
    verdict = f"**{judged.verdict[0].upper()}{judged.verdict[1:]}**"
    rule = f" ({claim.need} of {len(rows)} comparisons are needed; p of a row is not corrected)."
    text = [verdict + (f": {claim.not_testable}" if claim.not_testable else rule)]
    return Part(f"claim-{name}", claim.says, [*text, *filter(None, [claim.why])], [Table(head, rows, 5)])
