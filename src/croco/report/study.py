"""The page of a study, as Markdown and as HTML, from the runs of all seeds; written again only when something changed.

Percentages are of completions; an interval is of 95 % over seeds and prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from markdown_it import MarkdownIt
from markupsafe import Markup

from croco.config.checks import check
from croco.config.recipe import Recipe
from croco.config.study import Study
from croco.errors import UserError
from croco.pipeline.progress import count_of
from croco.pipeline.seeds import complete, of_seed, transfer_of
from croco.pipeline.seeds import parts as runs_of
from croco.report.claims import claim_part, claims_parts, judge_all
from croco.report.contrasts import Runs
from croco.report.curves import value_panel
from croco.report.exports import board_part
from croco.report.load_run import read_stages
from croco.report.multi_seed import Pooled, pool
from croco.report.page import render
from croco.report.render import parts_markdown
from croco.report.table import SCORE, Entry, Number, Part, Table, enumerate_words, temperature_name
from croco.report.transfer import SHOWN, read_scores, transfer_part
from croco.stages.evaluate.results import BASE, groups_of
from croco.stages.evaluate.stats import Interval
from croco.storage import files, provenance, records
from croco.storage.hashing import digest

VERSION = 8
HEADINGS = {"claims": "Claims", "secondary": "Secondary", "about": "How it was made", "kl": "KL",
            "transfer": "Transfer", "pairs": "Pairs"}  # fmt: skip


def write(recipe: Recipe, say: Callable[[str], None] = lambda line: None) -> Path:
    """Write RUN/study.md and RUN/study.html; returns the latter. Raises UserError naming a part that is missing."""
    made_of = digest([VERSION, complete(recipe), _study(recipe).model_dump(mode="json")])
    page, stamp = recipe.folder / "study.html", recipe.folder / "study.json"
    written = files.read_json(stamp) if stamp.exists() else None
    ours = written.get("made_of") if isinstance(written, dict) else None
    for path in (page, recipe.folder / "study.md", stamp):
        if path.exists() and not ours:
            raise UserError(f"{path} is not a page of croco's, expected another run.folder, or no such file")
    text = recipe.folder / "study.md"
    if page.exists() and text.exists() and ours == made_of:
        say("study: complete, skipped")
        return page
    parts = build([recipe])
    files.write_json(stamp, {"made_of": "unfinished"})  # first: after a kill the pages are known as ours
    files.write_text(text, markdown([recipe], parts))
    files.write_text(page, html([recipe], parts))
    files.write_json(stamp, {"made_of": made_of, **provenance.here()})
    return page


def together(recipes: Sequence[Recipe], as_markdown: bool) -> str:
    """One page of several studies, such as of two policies: a claim, of the first, holds only where it does in all."""
    claims = _study(recipes[0]).claims
    for recipe in recipes:
        try:
            check(recipe.model_copy(update={"study": _study(recipe).model_copy(update={"claims": claims})}))
        except ValueError as error:
            raise UserError(f"{recipe.folder} has not what {recipes[0].folder} claims: {error}") from None
    for recipe in recipes:
        complete(recipe)
    return (markdown if as_markdown else html)(recipes, build(recipes))


def _study(recipe: Recipe) -> Study:
    assert recipe.study is not None
    return recipe.study


def _name(recipes: Sequence[Recipe]) -> str:
    return enumerate_words([recipe.run.name for recipe in recipes])


def read_runs(recipe: Recipe) -> Runs:
    """The verdicts of a study's seeds, its sweeps, and how far its arms went from the base."""
    folders, arms = [of_seed(recipe, seed).folder for seed in _study(recipe).seeds], recipe.evaluated_arms
    pooled = pool(folders, arms, groups_of(recipe))
    kl: dict[str, dict[str, float]] = {}
    for arm in arms if recipe.evaluation.kl else ():
        of_seeds = [records.read_record(folder / "evaluate" / arm)["facts"]["kl"] for folder in folders]
        kl[arm] = {code: float(np.mean([of[code] for of in of_seeds])) for code in of_seeds[0]}
    ordered = {name: pooled[name] for name in sorted(pooled, key=len)}
    return Runs(ordered, {name: list(sweep.arms) for name, sweep in recipe.sweep.items()}, kl)


def build(recipes: Sequence[Recipe]) -> list[Part]:
    """Every part of the page, in order, each with its remark of the recipe; claims are the first study's."""
    study = _study(recipes[0])
    names = [recipe.run.name for recipe in recipes]
    if len(set(names)) < len(names):
        raise UserError(f"the studies are both called '{names[0]}', expected different values of run.name")
    studies = dict(zip(names, map(read_runs, recipes), strict=True))
    judged = judge_all(study, studies)
    parts = claims_parts(judged, study.equivalence, studies)
    parts.append(_about(recipes))
    parts += [claim_part(name, claim, studies, study.equivalence) for name, claim in judged.items()]
    for part in parts:
        part.text.extend(filter(None, [study.remarks.get(part.name)]))
    for recipe, (name, runs) in zip(recipes, studies.items(), strict=True):
        for part in _parts_of(recipe, runs):
            part.text.extend(filter(None, [_study(recipe).remarks.get(part.name)]))
            if len(recipes) > 1:
                part = replace(part, name=f"{part.name}-{name}", title=f"{part.title}, {name}")
            parts.append(part)
    return parts


def _parts_of(recipe: Recipe, runs: Runs) -> Iterator[Part]:
    """What one study shows beside its claims."""
    study, benchmarks = _study(recipe), list(runs.pooled.values())
    if runs.kl and runs.sweeps:
        yield kl_part(runs)
    yield from sweep_parts(recipe, benchmarks[0])
    if study.transfer:
        folders = [transfer_of(recipe, seed).folder for seed in study.seeds]
        yield transfer_part(read_scores(folders, SHOWN), recipe.run.evaluated)
    yield pairs_part(recipe)
    yield from (board_part(one.board(recipe.evaluated_arms)) for one in benchmarks)


def _about(recipes: Sequence[Recipe]) -> Part:
    made = ["Tables made by `croco run`, paragraphs written by hand."]
    for recipe in recipes:
        seeds = _study(recipe).seeds
        over = "seeds and prompts" if len(seeds) > 1 else "prompts, not over seeds, of which there is one"
        made.append(f"{recipe.run.name}: seed {', '.join(map(str, seeds))}; 95 % intervals over {over}.")
        if lost := left_out(recipe):
            made.append(
                f"{recipe.run.name} left out {lost}, over all seeds and arms, for the reasons in the ledgers."
            )
    here = provenance.here()
    made.append(
        f"{here['machine']}; {', '.join(f'{n} {version}' for n, version in here['libraries'].items())}."
    )
    return Part(
        "about", "How it was made", [*filter(None, [_study(recipes[0]).introduction]), " ".join(made)]
    )


def left_out(recipe: Recipe) -> str:
    """What the stages of all seeds dropped, of what they read; empty where nothing was lost."""
    counts = {"read": Counter[tuple[str, str]](), "dropped": Counter[tuple[str, str]]()}
    for part, _ in runs_of(recipe):
        for title, made in read_stages(part.folder, part).items():
            for name, counter in counts.items():
                of_units = made["counts"].get(name, {})
                counter.update({(unit, title.partition("/")[0]): count for unit, count in of_units.items()})
    lost = [
        f"{dropped:,} of {count_of(counts['read'][unit, stage], unit)} ({stage})"
        for (unit, stage), dropped in counts["dropped"].items()
        if dropped and unit != "flag"  # which marks, and drops nothing
    ]
    return enumerate_words(lost) if lost else ""


def markdown(recipes: Sequence[Recipe], parts: Sequence[Part]) -> str:
    """The page as Markdown, tables without curves."""
    return f"# {_name(recipes)}\n\n{parts_markdown(parts)}"


def html(recipes: Sequence[Recipe], parts: Sequence[Part]) -> str:
    """The same page for a browser, in one file, with curves; text of the recipe is Markdown, everything is escaped."""
    text = MarkdownIt("commonmark", {"html": False}).render
    shown = [(part, Markup("".join(map(text, part.text)))) for part in parts]
    headings = {}
    for part in parts:
        start, _, study = part.name.partition("-")
        if start == "arms":
            headings[part.name] = part.title
        elif start in HEADINGS:
            headings[part.name] = ", ".join(filter(None, [HEADINGS[start], study]))
    return render("study.html", name=_name(recipes), headings=headings, parts=shown)


def kl_part(runs: Runs) -> Part:
    """Quality against distance from the base: every sweep as a curve, at temperature 1."""
    pooled = next(iter(runs.pooled.values()))
    scope = pooled.main_groups[0]
    kl = {arm: runs.kl_of(arm, scope) for arm in (BASE, *runs.kl)}
    far = [arm for arm, of in kl.items() if of > 10 * float(np.median(list(kl.values())))]
    series = {
        sweep: sorted((kl[arm], pooled.mean((arm, 1.0), scope)) for arm in (BASE, *arms) if arm not in far)
        for sweep, arms in runs.sweeps.items()
    }
    rows: list[list[Entry]] = [
        [arm, SCORE.text(of), Number(pooled.mean((arm, 1.0), scope), pooled.unit)] for arm, of in kl.items()
    ]
    text = f"KL of an arm from the base: nats per completion, of its own completions at T = 1; {scope} languages."
    if far:
        text += f" Over ten times the median, and in the table only: {', '.join(far)}."
    panel = value_panel("KL", series, pooled.unit, grid=False)
    table = Table(["arm", "KL", pooled.benchmark], rows)
    return Part("kl", "Quality against distance from the base", [text], [table], [panel])


def sweep_parts(recipe: Recipe, pooled: Pooled) -> Iterator[Part]:
    """Each grid as a table; one over a number also as a curve."""
    unit = pooled.unit
    for name, sweep in recipe.sweep.items():
        keys = [key for key, values in sweep.grid.items() if len(values) > 1] or list(sweep.grid)
        fixed = "".join(f", {key} = {values[0]}" for key, values in sweep.grid.items() if key not in keys)
        rows = list[list[Entry]]()
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
        picked = f"The best is picked on these {recipe.evaluation.split} prompts."
        text = [f"{_best_places(series)} {picked}"] if series else []
        yield Part(f"sweep-{name}", f"Sweep: {', '.join(keys)} of {sweep.of}{fixed}", text, [table], panels)


def _best_places(series: Mapping[str, Sequence[tuple[float, Interval]]]) -> str:
    """Where each curve of a grid is highest, and whether that is inside the grid or at its edge."""
    words = []
    for name, points in series.items():
        best, grid = max(points, key=lambda point: point[1].value)[0], [x for x, _ in points]
        edge = best in (min(grid), max(grid))
        words.append(f"{name} {best:g}" + (" (at the edge of the grid)" if edge else ""))
    return f"Best at: {'; '.join(words)}."


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
    tables = [Table(head, rows, 3)]
    if chosen := _study(recipe).settings:
        tables.append(Table(["arm or sweep", "its settings were chosen"], list(chosen.items()), 2))
    return Part("pairs", "What the arms were tuned on", text, tables)


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
