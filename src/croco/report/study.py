"""The parts of a study's page as words and tables; nothing here knows Markdown or HTML.

Percentages are of completions; an interval is of 95 % over seeds and prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from croco import languages
from croco.config.recipe import Recipe
from croco.config.study import GROUPS
from croco.pipeline.seeds import of_seed
from croco.report import waves
from croco.report.claims import Judged
from croco.report.multi_seed import Pooled
from croco.report.transfer import FIGURES
from croco.stages.evaluate.results import BASE
from croco.stages.evaluate.stats import Interval
from croco.storage import shards

Rows = list[list[str]]


@dataclass(frozen=True)
class Table:
    """Texts in rows; `left` columns are words, the others numbers."""

    head: list[str]
    rows: Rows
    left: int = 1


@dataclass(frozen=True)
class Curve:
    """Values with intervals over a number, for a drawing: series -> [(x, interval)]."""

    title: str
    x: str
    y: str
    series: dict[str, list[tuple[float, Interval]]]


@dataclass(frozen=True)
class Part:
    """A part of the page: paragraphs, then tables and curves."""

    name: str
    title: str
    text: list[str]
    tables: list[Table] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)


def shown(interval: Interval, share: bool, signed: bool = False) -> str:
    """ "61 [58, 64]" in percent, or with two decimals."""
    sign = "+" if signed else ""
    values = [100 * x for x in interval] if share else list(interval)
    digits = ".0f" if share else ".2f"
    value, low, high = (f"{x:{sign}{digits}}".replace("-", "−") for x in values)
    return f"{value} [{low}, {high}]"


def decoding(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"T = {temperature:g}"


def claims_table(judged: Mapping[str, Judged], equivalence: float) -> list[Part]:
    """The verdicts, primary claims apart from secondary ones."""
    parts = []
    for secondary, title in ((False, "Claim by claim"), (True, "Secondary claims")):
        family = [one for one in judged.values() if one.claim.secondary == secondary]
        counted = sum(one.p_value is not None for one in family)
        rows = [
            [one.claim.says, one.verdict, "" if one.p_value is None else p_text(one.p_value)]
            for one in family
        ]
        text = (
            f"A claim holds, or does not, where all comparisons that it needs are significant that way, at 5 % after "
            f"Holm's correction over {counted} claims (p in the table). It is equivalent where the 90 % intervals lie "
            f"within ± {equivalence:g}. The base is at its best temperature."
        )
        if rows:
            name = "secondary-claims" if secondary else "claims"
            parts.append(Part(name, title, [text], [Table(["claim", "in this study", "p"], rows, 2)]))
    return parts


def p_text(p_value: float) -> str:
    """ "0.03", "< 0.001"."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.2g}"


def claim_part(name: str, judged: Judged, pooled: Mapping[str, Pooled]) -> Part:
    """One claim: its comparisons, and why it came out so."""
    claim, rows = judged.claim, []
    for test in judged.tests:
        one, share = test.comparison, pooled[test.comparison.benchmark].headline == "good"
        share = share or (one.metric or "").startswith("mode:")
        measure = (one.metric or pooled[one.benchmark].headline) + (
            f", {one.benchmark}" if one.benchmark != "lab" else ""
        )
        wanted = one.want + (f" by {100 * one.margin:g}" if one.margin and share else "")
        seeds = ", ".join(
            f"{100 * x if share else x:+.{0 if share else 2}f}".replace("-", "−") for x in test.by_seed
        )
        rows.append([
            one.arm, f"{test.rival[0]} ({decoding(test.rival[1])})", measure, test.scope,
            decoding(test.temperature), shown(test.difference, share, signed=True), seeds, wanted,
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
    if claim.not_testable:
        text = [f"{verdict}: {claim.not_testable}"]
    else:
        text = [
            f"{verdict} ({claim.need} of {len(rows)} comparisons are needed; p of a row is not corrected)."
        ]
    return Part(
        f"claim-{name}", claim.says, text + ([claim.why] if claim.why else []), [Table(head, rows, 5)]
    )


def arms_part(pooled: Pooled, arms: Sequence[str]) -> Part:
    """Every arm on every group, and what it gained over the base, at the same and at the base's best temperature."""
    share, scopes = pooled.headline == "good", [s for s in GROUPS if s != "all" and pooled.groups[s]]
    values: Rows = []
    gains: Rows = []
    for arm in [BASE, *arms]:
        for temperature in pooled.temperatures(arm):
            mine = (arm, temperature)
            values.append([arm, decoding(temperature), *(shown(pooled.mean(mine, s), share) for s in scopes)])
            if arm != BASE and (BASE, temperature) in pooled.settings:
                cells = []
                for scope in scopes:
                    same, _ = pooled.difference(mine, (BASE, temperature), scope)
                    best, _ = pooled.difference(mine, pooled.best(BASE, scope), scope)
                    cells.append(f"{shown(same, share, True)} / {shown(best, share, True)}")
                gains.append([arm, decoding(temperature), *cells])
    rivals = ", ".join(f"{scope}: {decoding(pooled.best(BASE, scope)[1])}" for scope in scopes)
    unit = "Percent of completions that are good" if share else "Mean score"
    text = [
        f"{unit}; {pooled.values.shape[0]} seeds, {pooled.num_prompts} test prompts a language.",
        f"Second table: gain over the base at the same temperature / at the base's best temperature ({rivals}).",
    ]
    head = ["arm", "decoding", *scopes]
    return Part(
        f"arms-{pooled.benchmark}",
        f"All arms: {pooled.benchmark}",
        text,
        [Table(head, values, 2), Table(head, gains, 2)],
    )


def languages_part(pooled: Pooled, arms: Sequence[str]) -> Part:
    """Every arm in every language, without intervals: where to look."""
    share, rows = pooled.headline == "good", []
    for arm in [BASE, *arms]:
        for temperature in pooled.temperatures(arm):
            means = [pooled.of((arm, temperature), code).mean() for code in pooled.languages]
            rows.append(
                [arm, decoding(temperature), *(f"{100 * x:.0f}" if share else f"{x:.2f}" for x in means)]
            )
    return Part(
        f"languages-{pooled.benchmark}",
        f"By language: {pooled.benchmark}",
        [],
        [Table(["arm", "decoding", *pooled.languages], rows, 2)],
    )


def modes_part(pooled: Pooled, arms: Sequence[str]) -> Part:
    """Where the mass went: the share of each mode, tuned and held-out languages apart."""
    modes = [metric for metric in pooled.metrics if metric.startswith("mode:")]
    rows = []
    for arm in [BASE, *arms]:
        for temperature in pooled.temperatures(arm):
            for scope in (s for s in GROUPS if s != "all" and pooled.groups[s]):
                means = [pooled.of((arm, temperature), scope, mode).mean() for mode in modes]
                rows.append([arm, decoding(temperature), scope, *(f"{100 * x:.0f}" for x in means)])
    head = ["arm", "decoding", "languages", *(mode.removeprefix("mode:") for mode in modes)]
    return Part(
        "modes", "Where the mass went", ["Percent of completions in each mode."], [Table(head, rows, 3)]
    )


def sweep_parts(recipe: Recipe, pooled: Pooled) -> Iterator[Part]:
    """Each grid as a table; one over a number also as a curve."""
    share, scopes = pooled.headline == "good", [s for s in GROUPS if s != "all" and pooled.groups[s]]
    for name, sweep in recipe.sweep.items():
        keys, rows = list(sweep.grid), []
        series: dict[str, list[tuple[float, Interval]]] = {}
        points = sorted(
            sweep.arms.items(), key=lambda point: [sweep.grid[key].index(point[1][key]) for key in keys]
        )
        for arm, place in points:
            for temperature in pooled.temperatures(arm):
                cells = [pooled.mean((arm, temperature), scope) for scope in scopes]
                rows.append(
                    [
                        *(_value(place[key]) for key in keys),
                        decoding(temperature),
                        *(shown(c, share) for c in cells),
                    ]
                )
                if len(keys) == 1 and isinstance(place[keys[0]], int | float):
                    for scope, cell in zip(scopes, cells, strict=True):
                        series.setdefault(f"{scope}, {decoding(temperature)}", []).append(
                            (float(place[keys[0]]), cell)
                        )
        curves = (
            [Curve(f"{sweep.of}: {keys[0]}", keys[0], "% good" if share else "mean score", series)]
            if series
            else []
        )
        table = Table([*keys, "decoding", *scopes], rows, len(keys) + 1)
        yield Part(f"sweep-{name}", f"Sweep: {', '.join(keys)} of {sweep.of}", [], [table], curves)


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def pairs_part(recipe: Recipe) -> Part:
    """What every arm was tuned on, over the seeds: pairs, shortcuts, languages, updates and seconds."""
    assert recipe.study is not None
    rows, stops = [], []
    for arm in recipe.arms:
        folders = [of_seed(recipe, seed).folder for seed in recipe.study.seeds]
        pairs = [shards.read_record(folder / "pair" / arm)["facts"] for folder in folders]
        tuned = [shards.read_record(folder / "train" / arm) for folder in folders]

        def mean(values: Sequence[float | None]) -> str:
            found = [value for value in values if value is not None]
            return f"{np.mean(found):.2f}" if found else ""

        rows.append([
            arm, f"{np.mean([p['pairs'] for p in pairs]):,.0f}",
            mean([p.get("share_other_than_minimum") for p in pairs]),
            *(mean([p.get("shortcuts", {}).get(key) for p in pairs]) for key in ("language", "length")),
            _mix(pairs, "chosen"), _mix(pairs, "rejected"),
            ", ".join(map(str, dict.fromkeys(t["facts"]["adapter_step"] for t in tuned))),
            f"{np.mean([t['seconds'] for t in tuned]):.0f}",
        ])  # fmt: skip
        for seed, facts in zip(recipe.study.seeds, (t["facts"] for t in tuned), strict=True):
            if facts["stopped"]:
                stops.append(
                    f"- {arm}, seed {seed}, taken at step {facts['adapter_step']}: {facts['stopped']}"
                )
    head = [
        "arm",
        "pairs",
        "not the minimum",
        "AUC language",
        "AUC length",
        "languages of chosen",
        "of rejected",
        "updates",
        "seconds",
    ]
    text = [
        "Means over seeds. AUC: how well language or length alone tells chosen from rejected (0.5: not at all)."
    ]
    if stops:
        text.append(
            "Stopped by the sentinel, and so with fewer updates than the others:\n\n" + "\n".join(stops)
        )
    return Part("pairs", "What the arms were tuned on", text, [Table(head, rows, 1)])


def _mix(pairs: Sequence[Mapping[str, Any]], side: str) -> str:
    """The two most frequent languages of a side, with their shares; "even" where none has twice its due."""
    counts: dict[str, float] = {}
    for facts in pairs:
        for code, found in facts.get("languages", {}).items():
            counts[code] = counts.get(code, 0) + found[side]
    total = sum(counts.values())
    if not total:
        return ""
    first = sorted(counts.items(), key=lambda item: -item[1])
    if first[0][1] / total < 1.5 / len(counts):
        return "even"
    return ", ".join(f"{code} {100 * count / total:.0f} %" for code, count in first[:2])


def waves_part(recipe: Recipe) -> Part:
    """The quality of pairs against what they cost, by a fixed number of completions and by waves that stop."""
    assert recipe.study is not None
    folders = [of_seed(recipe, seed).folder for seed in recipe.study.seeds]
    tables, text = [], [
        "Quality of the pairs (chosen: the best score, rejected: nearest to mean − 2·std) against tokens. Adaptive "
        f"rules draw {waves.WAVE} completions at a time (pooled: one a language) until the next promise little."
    ]  # fmt: skip
    for title, pooled in (("one language", False), ("all languages", True)):
        found = waves.points([waves.read_pools(folder, pooled) for folder in folders])
        rows = []
        for p in found:
            quality = (f"{100 * share:.1f}" for share in (p.chosen_good, p.rejected_good))
            rows.append([p.rule, f"{p.completions:.1f}", f"{p.tokens:.0f}", *quality])
        head = [f"pool: {title}", "completions", "tokens", "% chosen good", "% rejected good"]
        tables.append(Table(head, rows))
        shares = [(p.rule, waves.saved(found, p)) for p in found if not p.rule.startswith("gain")]
        said = [
            f"{rule}: {100 * share:.0f} %".replace("-", "−") for rule, share in shares if share is not None
        ]
        text.append(
            f"Tokens that the cheapest rule saves beside the cheapest fixed number, both with chosen as good as "
            f"those of N, pool of {title}: {'; '.join(said)}."
        )
    return Part("waves", "How many completions are worth it?", text, tables)


def transfer_part(
    found: Mapping[tuple[str, str, str], Interval],
    forms: Mapping[tuple[str, str], Interval],
    scorers: Sequence[str],
) -> Part:
    """Reward model, likelihood and chance against the verified truth, in every language and per pair of forms."""
    codes = list(dict.fromkeys(code for _, code, _ in found))
    titles = {
        "ranking": "percent of unequal pairs ranked right",
        "best": "percent of prompts whose best-scored completion is good",
        "tau": "Kendall's τ-b with verified quality",
    }
    # the truth ranks itself right; as a picker it is the ceiling
    own = [scorer for scorer in scorers if scorer != "verified"]
    tables = [
        Table(["percent of pairs with the good one above: good and", *own], [
            [form, *(shown(forms[scorer, form], True) for scorer in own)]
            for form in sorted({form for _, form in forms})
        ])
    ]  # fmt: skip
    for figure in FIGURES:
        columns = scorers if figure == "best" else own
        rows = [
            [languages.name(code)]
            + [
                shown(found[key], figure != "tau") if (key := (scorer, code, figure)) in found else ""
                for scorer in columns
            ]
            for code in codes
        ]
        tables.append(Table([titles[figure], *columns], rows))
    text = [
        "Within one prompt in one language, on dev prompts; the completions of all seeds together.",
        "The first table tells quality from form: most unequal pairs are of different form.",
    ]
    return Part("transfer", "Does the reward model transfer?", text, tables)
