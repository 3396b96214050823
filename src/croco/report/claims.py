"""Judges a claim by its comparisons: one rule, the same in both directions.

A comparison has a two-sided test of its difference against the border that its `want` and `margin` name. A claim
holds when enough of its comparisons are significant as wanted, does not hold when as many are significant to the
contrary (intersection-union; for "most" the partial conjunction of Benjamini and Heller 2008), both after Holm's
correction over the claims of its family. Else it is equivalent where as many comparisons lie within the study's
equivalence margin (two one-sided tests at 5 %: the 90 % interval), else not resolved. With the studies of several
policies every one of them must agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from croco.config.study import Claim, Study
from croco.pipeline.progress import count_of
from croco.report.contrasts import KL, Runs, Test, run_tests
from croco.report.curves import value_panel
from croco.report.scores import TITLES
from croco.report.table import (
    PERCENT,
    SCORE,
    SCORE_CHANGE,
    Entry,
    Number,
    Part,
    Table,
    Unit,
    enumerate_words,
    temperature_name,
)
from croco.stages.evaluate.stats import ALPHA, holm

HOLDS, FAILS, EQUIVALENT, OPEN = "holds", "does not hold", "equivalent", "not resolved"
UNTESTABLE = "not testable here"
TENTHS = Unit(100, digits=1, signed=True)  # of a point: the margin of equivalence is two points


@dataclass(frozen=True)
class Judged:
    """A claim with its tests in every study, its p-value after Holm's correction and its verdict."""

    claim: Claim
    tests: Mapping[str, list[Test]]  # by study
    p_value: float | None  # None: not testable
    verdict: str
    alone: Mapping[str, str]  # the verdict of each study by itself

    def deciding(self, study: str) -> Test:
        """The comparison on which the claim hangs: of those that are needed the one whose interval reaches least far as
        wanted."""
        tests = self.tests[study]
        return sorted(tests, key=lambda test: -test.reach)[needed(self.claim, tests) - 1]


def judge_all(study: Study, studies: Mapping[str, Runs]) -> dict[str, Judged]:
    """Every claim; primary and secondary claims are corrected apart, untestable ones not counted."""
    tests = {
        name: {
            label: [test for c in claim.tests for test in run_tests(c, runs, study.equivalence)]
            for label, runs in studies.items()
        }
        for name, claim in study.claims.items()
    }
    together = _decided(study, {name: list(of.values()) for name, of in tests.items()})
    alone = {label: _decided(study, {name: [of[label]] for name, of in tests.items()}) for label in studies}
    return {
        name: Judged(claim, tests[name], *together[name], {label: alone[label][name][1] for label in studies})
        for name, claim in study.claims.items()
    }


def _decided(
    study: Study, tests: Mapping[str, Sequence[Sequence[Test]]]
) -> dict[str, tuple[float | None, str]]:
    """p-value and verdict of every claim, from its tests in the studies that must agree."""
    decided: dict[str, tuple[float | None, str]] = dict.fromkeys(study.claims, (None, UNTESTABLE))
    for secondary in (False, True):
        names = [n for n, c in study.claims.items() if c.secondary == secondary and not c.not_testable]
        directions = []
        for name in names:
            of_studies = [claim_p_values(study.claims[name], one) for one in tests[name]]
            directions.append([max(p_values) for p_values in zip(*of_studies, strict=True)])
        adjusted = holm([min(1.0, 2 * min(both)) for both in directions])
        for name, both, p_value in zip(names, directions, adjusted, strict=True):
            verdict = OPEN
            if p_value <= ALPHA:
                verdict = HOLDS if both[0] < both[1] else FAILS
            elif all(
                sum(t.equivalent for t in one) >= needed(study.claims[name], one) for one in tests[name]
            ):
                verdict = EQUIVALENT
            decided[name] = p_value, verdict
    return decided


def needed(claim: Claim, tests: Sequence[Test]) -> int:
    return len(tests) if claim.need == "all" else len(tests) // 2 + 1


def claim_p_values(claim: Claim, tests: Sequence[Test]) -> tuple[float, float]:
    """One-sided p-values that fewer than the needed number of tests are as wanted, and to the contrary.

    (n − u + 1) · p₍ᵤ₎ for u needed of n (Benjamini and Heller 2008, Bonferroni form); with all needed the largest p."""
    u, n = needed(claim, tests), len(tests)
    wanted = sorted(test.p_wanted for test in tests)
    contrary = sorted(1 - test.p_wanted for test in tests)
    return min(1.0, (n - u + 1) * wanted[u - 1]), min(1.0, (n - u + 1) * contrary[u - 1])


# On the page ----------------------------------------------------------------------------------------------------------


def claims_parts(judged: Mapping[str, Judged], equivalence: float, studies: Mapping[str, Runs]) -> list[Part]:
    """The verdicts, primary claims apart from secondary ones: what a reader takes away."""
    parts = []
    for secondary, name, title in (
        (False, "claims", "Claim by claim"),
        (True, "secondary", "Secondary claims"),
    ):
        family = [one for one in judged.values() if one.claim.secondary == secondary]
        counted = sum(one.p_value is not None for one in family)
        counts = Counter(one.verdict for one in family)
        many = {HOLDS: "hold", FAILS: "do not hold"}
        verdicts = [
            f"{counts[verdict]} {verdict if counts[verdict] == 1 else many.get(verdict, verdict)}"
            for verdict in (HOLDS, FAILS, EQUIVALENT, OPEN, UNTESTABLE)
            if counts[verdict]
        ]
        rows: list[list[Entry]] = [
            [one.claim.says, one.verdict, *(difference_of(one.deciding(s), studies[s]) for s in studies),
             "" if one.p_value is None else p_text(one.p_value)]
            for one in family
        ]  # fmt: skip
        every = f" and in each of the {len(studies)} studies" if len(studies) > 1 else ""
        text = (
            f"Of {count_of(len(family), 'claim')}: {', '.join(verdicts)}. A claim holds, or does not, where all "
            f"comparisons that it needs are significant that way{every}, at 5 % after Holm's correction over "
            f"{count_of(counted, 'claim')} (p in the table). It is equivalent where the 90 % intervals lie within "
            f"{_margin(equivalence, studies)}. Of several differences the one is shown whose interval reaches least "
            "far as claimed; the base is at its best temperature."
        )
        if rows:
            head = ["claim", "verdict", *(studies if len(studies) > 1 else ["difference"]), "p"]
            parts.append(Part(name, title, [text], [Table(head, rows, 2)]))
    return parts


def unit_of(test: Test, runs: Runs) -> Unit:
    """How a comparison's difference is written."""
    share = runs.pooled[test.comparison.benchmark].is_share
    return TENTHS if share or (test.comparison.metric or "").startswith("mode:") else SCORE_CHANGE


def _margin(equivalence: float, studies: Mapping[str, Runs]) -> str:
    shares = all(pooled.is_share for runs in studies.values() for pooled in runs.pooled.values())
    return f"± {100 * equivalence:g} points" if shares else f"± {equivalence:g}"


def difference_of(test: Test, runs: Runs) -> Number:
    return Number(test.estimate.interval(), unit_of(test, runs))


def p_text(p_value: float) -> str:
    """ "0.03", "< 0.001"."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.2g}"


def claim_part(name: str, judged: Judged, studies: Mapping[str, Runs], equivalence: float) -> Part:
    """One claim: its verdict, what was measured, its comparisons, and why it came out so."""
    claim, several = judged.claim, len(studies) > 1
    rows, panels, measures = list[list[Entry]](), [], list[str]()
    for label, runs in studies.items():
        for test in judged.tests[label]:
            one, unit = test.comparison, unit_of(test, runs)
            border = f" by {unit.factor * one.margin:g}" if one.margin else ""
            measures.append(
                TITLES.get(one.benchmark, one.benchmark) + (f", {one.metric}" if one.metric else "")
            )
            rows.append([
                test.words, *([label] if several else []), f"{test.scope}, {temperature_name(test.temperature)}",
                one.want + border, difference_of(test, runs), ", ".join(map(unit.text, test.by_seed)),
                p_text(min(1.0, 2 * min(test.p_wanted, 1 - test.p_wanted))), p_text(test.p_equivalent),
            ])  # fmt: skip
            if test.curves:
                over = KL if one.at_equal == KL else f"{one.at_equal} in percent"
                scale = 1 if one.at_equal == KL else 100
                series = {sweep: [(scale * x, y) for x, y in curve] for sweep, curve in test.curves.items()}
                title = f"{one.benchmark} over {over}" + (f", {label}" if several else "")
                panels.append(value_panel(title, series, PERCENT if unit is TENTHS else SCORE, grid=False))
    alone = ", ".join(f"{label}: {verdict}" for label, verdict in judged.alone.items())
    verdict = f"**{judged.verdict[0].upper()}{judged.verdict[1:]}**" + (f" ({alone})" if several else "")
    verdict += f": {claim.not_testable}" if claim.not_testable else "."
    measure = (
        f"Measured: {enumerate_words(list(dict.fromkeys(measures)))}; {claim.need} of "
        f"{count_of(len(rows) // len(studies), 'comparison')} must be as claimed{' in every study' if several else ''}."
    )
    text = [verdict, measure, *filter(None, [claim.why])]
    head = ["difference of", *(["study"] if several else []), "on", "claimed", "difference", "each seed", "p",
            f"p within {_margin(equivalence, studies)}"]  # fmt: skip
    return Part(f"claim-{name}", claim.says, text, [Table(head, rows, 3 + several)], panels)
