"""The report: one self-contained HTML page that says what a run found, and the stage that writes it.

Everything is in the page (style, scripts, charts, data), nothing is fetched, and whatever a model or a file wrote is
escaped: Jinja escapes all values, and texts to browse travel packed (`browser.py`) and are shown with `textContent`.
What the sections say lives in `sections.py`, their layout in `templates/`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from croco.pipeline.progress import count_of
from croco.pipeline.stage import Work
from croco.report import sections
from croco.report.browser import browse, packed
from croco.report.load_run import Run, read_run
from croco.report.scores import ARENA, boards_of
from croco.report.table import numbers, scope_name
from croco.storage.files import write_text

TEMPLATES = Path(__file__).parent / "templates"


def report(work: Work) -> None:
    """Write the page of the run that `work.folder` lies in to `report.html`."""
    write_text(work.folder / "report.html", build_page(work.folder.parent))


def build_page(run_folder: Path) -> str:
    """The page of a finished run, as HTML. Raises UserError when the run is not complete."""
    return render("page.html", **_context(read_run(run_folder)))


def _context(run: Run) -> dict[str, Any]:
    made = boards_of(run)
    arena = made.pop() if made[-1].benchmark == ARENA else None
    others = sections.other_results(run, arena)
    return {
        "name": run.recipe.run.name,
        "headings": {name: title for name, title in sections.HEADINGS.items() if others.get(name, True)},
        "facts": sections.facts(run, made),
        **sections.verdicts(run, [*made, *([arena] if arena else [])]),
        **sections.results(run, made),
        **others,
        "modes": sections.modes(run, made[0]),
        **sections.distributions(run),
        "steps": run.steps,
        **sections.training(run.metrics),
        **sections.provenance(run),
        **browsing({"": run}),
    }


def browsing(runs: Mapping[str, Run]) -> dict[str, Any]:
    """The list of pairs, comparisons, completions and what was left out, packed."""
    data = browse(runs)
    return {"data": packed(data), "kinds": {name: kind["title"] for name, kind in data["kinds"].items()}}


def render(template: str, **context: Any) -> str:
    """A template with the style, the scripts and the words that every page needs."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader(TEMPLATES),
    )
    environment.filters["enumerated"] = enumerate
    words = {"scope_name": scope_name, "count_of": count_of, "numbers": numbers}
    style = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "charts.css"))
    scripts = {
        name: Markup((TEMPLATES / f"{name}.js").read_text(encoding="utf-8")) for name in ("page", "browser")
    }
    return environment.get_template(template).render(**words, style=Markup(style), scripts=scripts, **context)
