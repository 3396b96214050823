"""The study's page, as Markdown and as HTML, from the runs of all seeds; written again only when something changed."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.pipeline.seeds import SCORERS, complete, of_seed, transfer_of
from croco.report import study as building
from croco.report.claims import judge_all
from croco.report.figures import draw
from croco.report.multi_seed import pool
from croco.report.study import Part, Table
from croco.report.transfer import good_over_forms, transfer
from croco.stages.evaluate.results import language_groups
from croco.storage import provenance, shards
from croco.storage.hashing import digest

VERSION = 4
STYLE = Path(__file__).parent / "study.css"


def write(recipe: Recipe, say: Callable[[str], None] = lambda line: None) -> Path:
    """Write RUN/study.md and RUN/study.html; returns the latter. Raises UserError naming a part that is missing."""
    assert recipe.study is not None
    made_of = digest(
        [VERSION, complete(recipe), recipe.study.model_dump(mode="json"), recipe.evaluation.bootstrap]
    )
    page, stamp = recipe.folder / "study.html", recipe.folder / "study.json"
    there = shards.read_json(stamp) if stamp.exists() else None
    ours = there.get("made_of") if isinstance(there, dict) else None
    for path in (page, recipe.folder / "study.md", stamp):
        if path.exists() and not ours:
            raise UserError(f"{path} is not a page of croco's, expected another run.folder, or no such file")
    if page.exists() and ours == made_of:
        say("study: complete, skipped")
        return page
    found = build(recipe)
    shards.write_text(recipe.folder / "study.md", markdown(recipe, found))
    shards.write_text(page, html(recipe, found))
    shards.write_json(stamp, {"made_of": made_of, **provenance.here()})
    return page


def build(recipe: Recipe) -> list[Part]:
    """Every part of the page, in order."""
    assert recipe.study is not None
    run, study = recipe.run, recipe.study
    groups = language_groups(run.languages, run.low_resource_languages, run.held_out_languages)
    seeds, arms = [of_seed(recipe, seed).folder for seed in study.seeds], recipe.evaluated_arms
    pooled = pool(seeds, arms, groups, recipe.evaluation.bootstrap)
    judged = judge_all(study, pooled)
    found = building.claims_table(judged, study.equivalence)
    found += [building.claim_part(name, claim, pooled) for name, claim in judged.items()]
    for benchmark in sorted(pooled, key=len):
        found.append(building.arms_part(pooled[benchmark], arms))
    first = pooled[min(pooled, key=len)]
    found += building.sweep_parts(recipe, first)
    if recipe.prompts.source == "lab":  # verified completions
        found.append(building.waves_part(recipe))
    if study.transfer:
        folders = [transfer_of(recipe, seed).folder for seed in study.seeds]
        found.append(
            building.transfer_part(
                transfer(folders, SCORERS, run.evaluated), good_over_forms(folders, SCORERS), SCORERS
            )
        )
    found += [building.modes_part(first, arms), building.pairs_part(recipe)]
    found += [building.languages_part(pooled[benchmark], arms) for benchmark in sorted(pooled, key=len)]
    return found


def markdown(recipe: Recipe, found: list[Part]) -> str:
    """The page as Markdown, tables without figures."""
    assert recipe.study is not None
    here = provenance.here()
    versions = ", ".join(f"{name} {version}" for name, version in here["libraries"].items())
    introduction = [recipe.study.introduction] if recipe.study.introduction else []
    made = f"Tables made by `croco run`, paragraphs written by hand. {_how(recipe)} {here['machine']}; {versions}."
    lines = [f"# {recipe.run.name}", *introduction, made]
    for part in found:
        lines += [f"## {part.title}", *part.text]
        if remark := recipe.study.remarks.get(part.name):
            lines.append(remark)
        lines += [_markdown_table(table) for table in part.tables]
    return "\n\n".join(lines) + "\n"


def _how(recipe: Recipe) -> str:
    assert recipe.study is not None
    seeds = ", ".join(map(str, recipe.study.seeds))
    return (
        f"Seeds {seeds}; values with 95 % intervals over seeds and prompts (pigeonhole bootstrap: with few samples a "
        "prompt it covers more often than 95 %)."
    )


def _markdown_table(table: Table) -> str:
    rule = ["---"] * table.left + ["---:"] * (len(table.head) - table.left)
    rows = [table.head, rule, *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def html(recipe: Recipe, found: list[Part]) -> str:
    """The same page for a browser, in one file, with curves; text of the recipe is Markdown, everything is escaped."""
    assert recipe.study is not None
    text = MarkdownIt("commonmark", {"html": False}).render
    here = provenance.here()
    body = [text(recipe.study.introduction)]
    contents = "".join(f'<li><a href="#{part.name}">{escape(part.title)}</a></li>' for part in found)
    for part in found:
        body.append(f'<section id="{part.name}"><h2>{escape(part.title)}</h2>')
        body += [text(paragraph) for paragraph in part.text]
        if remark := recipe.study.remarks.get(part.name):
            body.append(text(remark))
        body += [f"<figure>{draw(curve, f'{part.name}-{n}')}</figure>" for n, curve in enumerate(part.curves)]
        body += [_html_table(table) for table in part.tables]
        body.append("</section>")
    name, style = escape(recipe.run.name), STYLE.read_text(encoding="utf-8")
    versions = ", ".join(f"{library} {version}" for library, version in here["libraries"].items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style></head><body>'
        f"<header><h1>{name}</h1><p>{_how(recipe)}</p></header><nav><ol>{contents}</ol></nav><main>{''.join(body)}</main>"
        f"<footer><p>{escape(here['machine'])}; {escape(versions)}</p></footer></body></html>\n"
    )


def _html_table(table: Table) -> str:
    def row(cells: list[str], tag: str) -> str:
        kinds = ["word"] * table.left + ["number"] * (len(cells) - table.left)
        inside = "".join(
            f'<{tag} class="{kind}">{escape(cell)}</{tag}>' for kind, cell in zip(kinds, cells, strict=True)
        )
        return f"<tr>{inside}</tr>"

    rows = "".join(row(cells, "td") for cells in table.rows)
    return (
        f'<div class="wide"><table><thead>{row(table.head, "th")}</thead><tbody>{rows}</tbody></table></div>'
    )
