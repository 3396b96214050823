"""The page of a study, as Markdown and as HTML, from the runs of all seeds; written again only when something changed.

Percentages are of completions; an interval is of 95 % over seeds and prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markdown_it import MarkdownIt
from markupsafe import Markup

from croco import languages
from croco.config.recipe import Recipe
from croco.config.study import Study
from croco.errors import UserError
from croco.pipeline.seeds import SCORERS, complete, of_seed, transfer_of
from croco.report.claims import claim_part, claims_parts, judge_all
from croco.report.curves import value_panel
from croco.report.multi_seed import Pooled, pool
from croco.report.page import render
from croco.report.render import markdown as table_markdown
from croco.report.table import (
    PERCENT,
    POINTS,
    SCORE,
    SCORE_CHANGE,
    Entry,
    Number,
    Part,
    Table,
    temperature_name,
)
from croco.report.transfer import FIGURES, good_over_forms, transfer
from croco.stages.evaluate.results import BASE, language_groups
from croco.stages.evaluate.stats import Interval
from croco.storage import files, provenance, records
from croco.storage.hashing import digest

VERSION = 6
SHOWN = (SCORERS[0], "heuristic", *SCORERS[1:])  # held against each other in the transfer


def write(recipe: Recipe, say: Callable[[str], None] = lambda line: None) -> Path:
    """Write RUN/study.md and RUN/study.html; returns the latter. Raises UserError naming a part that is missing."""
    study = _study(recipe)
    made_of = digest([VERSION, complete(recipe), study.model_dump(mode="json"), recipe.evaluation.bootstrap])
    page, stamp = recipe.folder / "study.html", recipe.folder / "study.json"
    written = files.read_json(stamp) if stamp.exists() else None
    ours = written.get("made_of") if isinstance(written, dict) else None
    for path in (page, recipe.folder / "study.md", stamp):
        if path.exists() and not ours:
            raise UserError(f"{path} is not a page of croco's, expected another run.folder, or no such file")
    if page.exists() and ours == made_of:
        say("study: complete, skipped")
        return page
    parts = build(recipe)
    files.write_text(recipe.folder / "study.md", markdown(recipe, parts))
    files.write_text(page, html(recipe, parts))
    files.write_json(stamp, {"made_of": made_of, **provenance.here()})
    return page


def _study(recipe: Recipe) -> Study:
    assert recipe.study is not None
    return recipe.study


def build(recipe: Recipe) -> list[Part]:
    """Every part of the page, in order, each with its remark of the recipe."""
    run, study = recipe.run, _study(recipe)
    groups = language_groups(run.languages, run.low_resource_languages, run.held_out_languages)
    seeds, arms = [of_seed(recipe, seed).folder for seed in study.seeds], recipe.evaluated_arms
    pooled = pool(seeds, arms, groups, recipe.evaluation.bootstrap)
    benchmarks = [pooled[name] for name in sorted(pooled, key=len)]
    judged = judge_all(study, pooled)
    parts = claims_parts(judged, study.equivalence)
    parts += [claim_part(name, claim, pooled) for name, claim in judged.items()]
    parts += [arms_part(one, arms) for one in benchmarks]
    parts += sweep_parts(recipe, benchmarks[0])
    if study.transfer:
        folders = [transfer_of(recipe, seed).folder for seed in study.seeds]
        parts.append(transfer_part(transfer(folders, SHOWN, run.evaluated), good_over_forms(folders, SHOWN)))
    parts += [modes_part(benchmarks[0], arms), pairs_part(recipe)]
    parts += [languages_part(one, arms) for one in benchmarks]
    for part in parts:
        if remark := study.remarks.get(part.name):
            part.text.append(remark)
    return parts


def _made(recipe: Recipe) -> str:
    seeds = ", ".join(map(str, _study(recipe).seeds))
    return (
        f"Seeds {seeds}; values with 95 % intervals over seeds and prompts (pigeonhole bootstrap: with few samples a "
        "prompt it covers more often than 95 %)."
    )


def _versions() -> str:
    here = provenance.here()
    return (
        f"{here['machine']}; {', '.join(f'{name} {version}' for name, version in here['libraries'].items())}."
    )


def markdown(recipe: Recipe, parts: Sequence[Part]) -> str:
    """The page as Markdown, tables without curves."""
    made = f"Tables made by `croco run`, paragraphs written by hand. {_made(recipe)} {_versions()}"
    lines = [f"# {recipe.run.name}", _study(recipe).introduction, made]
    for part in parts:
        lines += [f"## {part.title}", *part.text, *(table_markdown(table).rstrip() for table in part.tables)]
    return "\n\n".join(filter(None, lines)) + "\n"


def html(recipe: Recipe, parts: Sequence[Part]) -> str:
    """The same page for a browser, in one file, with curves; text of the recipe is Markdown, everything is escaped."""
    text = MarkdownIt("commonmark", {"html": False}).render
    shown = [(part, Markup("".join(map(text, part.text)))) for part in parts]
    named = {"claims": "Claims", "transfer": "Transfer", "modes": "Modes", "pairs": "Pairs"}
    headings = {
        part.name: named.get(part.name, part.title)
        for part in parts
        if part.name in named or part.name.startswith(("arms-", "languages-"))
    }
    return render(
        "study.html", name=recipe.run.name, headings=headings, made=_made(recipe), versions=_versions(),
        introduction=Markup(text(_study(recipe).introduction)), parts=shown,
    )  # fmt: skip


def arms_part(pooled: Pooled, arms: Sequence[str]) -> Part:
    """Every arm on every group, and what it gained over the base, at the same and at the base's best temperature."""
    values, gains = list[list[Entry]](), list[list[Entry]]()
    unit, change = (PERCENT, POINTS) if pooled.is_share else (SCORE, SCORE_CHANGE)
    for setting in pooled.settings_of([BASE, *arms]):
        arm, temperature = setting
        named: list[Entry] = [arm, temperature_name(temperature)]
        values.append([*named, *(Number(pooled.mean(setting, scope), unit) for scope in pooled.main_groups)])
        if arm != BASE and (BASE, temperature) in pooled.settings:
            rivals = [((BASE, temperature), pooled.best(BASE, scope)) for scope in pooled.main_groups]
            gains.append(named + [
                tuple(Number(pooled.difference(setting, rival, scope)[0], change) for rival in both)
                for scope, both in zip(pooled.main_groups, rivals, strict=True)
            ])  # fmt: skip
    best = ", ".join(
        f"{scope}: {temperature_name(pooled.best(BASE, scope)[1])}" for scope in pooled.main_groups
    )
    text = [
        f"{'Percent of completions that are good' if pooled.is_share else 'Mean score'}; {pooled.num_seeds} seeds, "
        f"{pooled.num_prompts} test prompts a language.",
        f"Second table: gain over the base at the same temperature / at the base's best temperature ({best}).",
    ]
    head = ["arm", "decoding", *pooled.main_groups]
    tables = [Table(head, values, 2), Table(head, gains, 2)]
    return Part(f"arms-{pooled.benchmark}", f"All arms: {pooled.benchmark}", text, tables)


def languages_part(pooled: Pooled, arms: Sequence[str]) -> Part:
    """Every arm in every language, without intervals: where to look."""
    unit = PERCENT if pooled.is_share else SCORE
    rows = [
        [
            arm,
            temperature_name(t),
            *(unit.text(pooled.of((arm, t), code).mean()) for code in pooled.languages),
        ]
        for arm, t in pooled.settings_of([BASE, *arms])
    ]
    table = Table(["arm", "decoding", *pooled.languages], rows, 2)
    return Part(f"languages-{pooled.benchmark}", f"By language: {pooled.benchmark}", [], [table])


def modes_part(pooled: Pooled, arms: Sequence[str]) -> Part:
    """Where the mass went: the share of each mode, per group of languages."""
    modes = [metric for metric in pooled.metrics if metric.startswith("mode:")]
    rows = [
        [
            arm,
            temperature_name(t),
            scope,
            *(PERCENT.text(pooled.of((arm, t), scope, mode).mean()) for mode in modes),
        ]
        for arm, t in pooled.settings_of([BASE, *arms])
        for scope in pooled.main_groups
    ]
    head = ["arm", "decoding", "languages", *(mode.removeprefix("mode:") for mode in modes)]
    return Part(
        "modes", "Where the mass went", ["Percent of completions in each mode."], [Table(head, rows, 3)]
    )


def sweep_parts(recipe: Recipe, pooled: Pooled) -> Iterator[Part]:
    """Each grid as a table; one over a number also as a curve."""
    unit = PERCENT if pooled.is_share else SCORE
    for name, sweep in recipe.sweep.items():
        keys, rows = list(sweep.grid), list[list[Entry]]()
        series: dict[str, list[tuple[float, Interval]]] = {}
        points = sorted(
            sweep.arms.items(), key=lambda point: [sweep.grid[k].index(point[1][k]) for k in keys]
        )
        for arm, place in points:
            first = place[keys[0]]
            for t in pooled.temperatures(arm):
                cells = {scope: pooled.mean((arm, t), scope) for scope in pooled.main_groups}
                values = [", ".join(map(str, v)) if isinstance(v := place[k], list) else str(v) for k in keys]
                rows.append([*values, temperature_name(t), *(Number(cell, unit) for cell in cells.values())])
                if len(keys) == 1 and isinstance(first, int | float):
                    for scope, cell in cells.items():
                        series.setdefault(f"{scope}, {temperature_name(t)}", []).append((float(first), cell))
        table = Table([*keys, "decoding", *pooled.main_groups], rows, len(keys) + 1)
        panels = [value_panel(f"{keys[0]} of {sweep.of}", series, unit)] if series else []
        yield Part(f"sweep-{name}", f"Sweep: {', '.join(keys)} of {sweep.of}", [], [table], panels)


def pairs_part(recipe: Recipe) -> Part:
    """What every arm was tuned on, over the seeds: pairs, shortcuts, languages, updates and seconds."""
    rows, stops, seeds = list[list[Entry]](), list[str](), _study(recipe).seeds
    folders = [of_seed(recipe, seed).folder for seed in seeds]
    for arm in recipe.arms:
        pairs = [records.read_record(folder / "pair" / arm)["facts"] for folder in folders]
        tuned = [records.read_record(folder / "train" / arm) for folder in folders]
        shares = [[p.get("share_other_than_minimum") for p in pairs]]
        shares += [[p.get("shortcuts", {}).get(key) for p in pairs] for key in ("language", "length")]
        known = [[value for value in values if value is not None] for values in shares]
        rows.append([
            arm, _mix(pairs, "chosen"), _mix(pairs, "rejected"), f"{np.mean([p['pairs'] for p in pairs]):,.0f}",
            *(f"{np.mean(values):.2f}" if values else "" for values in known),
            ", ".join(map(str, dict.fromkeys(t["facts"]["adapter_step"] for t in tuned))),
            f"{np.mean([t['seconds'] for t in tuned]):.0f}",
        ])  # fmt: skip
        stops += [
            f"- {arm}, seed {seed}, taken at step {made['facts']['adapter_step']}: {made['facts']['stopped']}"
            for seed, made in zip(seeds, tuned, strict=True)
            if made["facts"]["stopped"]
        ]
    head = ["arm", "languages of chosen", "of rejected", "pairs", "not the minimum", "AUC language", "AUC length",
            "updates", "seconds"]  # fmt: skip
    text = [
        "Means over seeds. AUC: how well language or length alone tells chosen from rejected (0.5: not at all)."
    ]
    if stops:
        text.append(
            "Stopped by the sentinel, and so with fewer updates than the others:\n\n" + "\n".join(stops)
        )
    return Part("pairs", "What the arms were tuned on", text, [Table(head, rows, 3)])


def _mix(pairs: Sequence[Mapping[str, Any]], side: str) -> str:
    """The two most frequent languages of a side with their shares; "even" where none has 1.5 times its share."""
    counts: dict[str, float] = {}
    for facts in pairs:
        for code, sides in facts.get("languages", {}).items():
            counts[code] = counts.get(code, 0) + sides[side]
    if not (total := sum(counts.values())):
        return ""
    first = sorted(counts.items(), key=lambda item: -item[1])
    if first[0][1] / total < 1.5 / len(counts):
        return "even"
    return ", ".join(f"{code} {100 * count / total:.0f} %" for code, count in first[:2])


def transfer_part(
    figures: Mapping[tuple[str, str, str], Interval], forms: Mapping[tuple[str, str], Interval]
) -> Part:
    """Reward model, likelihood and chance against the verified truth, in every language and per pair of forms."""
    codes = list(dict.fromkeys(code for _, code, _ in figures))
    titles = {
        "ranking": "percent of unequal pairs ranked right",
        "best": "percent of prompts whose best-scored completion is good",
        "tau": "Kendall's τ-b with verified quality",
    }
    own = [scorer for scorer in SHOWN if scorer != "verified"]  # the truth ranks itself right
    by_form: list[list[Entry]] = [
        [form, *(Number(forms[scorer, form], PERCENT) for scorer in own)]
        for form in sorted({f for _, f in forms})
    ]
    tables = [Table(["percent of pairs with the good one above: good and", *own], by_form)]
    for figure in FIGURES:
        columns, unit = SHOWN if figure == "best" else own, SCORE if figure == "tau" else PERCENT
        rows: list[list[Entry]] = [
            [languages.name(code), *(
                Number(figures[key], unit) if (key := (scorer, code, figure)) in figures else None for scorer in columns
            )]
            for code in codes
        ]  # fmt: skip
        tables.append(Table([titles[figure], *columns], rows))
    text = [
        "Within one prompt in one language, on dev prompts; the completions of all seeds together.",
        "The first table tells quality from form: most unequal pairs are of different form. The heuristic needs no "
        "label: letters of the language, a rare text, a usual length.",
    ]
    return Part("transfer", "Does the reward model transfer?", text, tables)
