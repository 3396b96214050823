"""What `croco report` and `croco compare` do once their arguments are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console, RenderableType

from croco.config.load import load
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.pipeline import run
from croco.pipeline.graph import nodes
from croco.pipeline.progress import count_of
from croco.report import study
from croco.report.compare import compare
from croco.report.exports import comparison_terminal, results_latex, results_markdown, results_terminal
from croco.report.load_run import read_recipe, read_results, read_stages, steps_of
from croco.report.render import terminal
from croco.report.table import Entry, Table
from croco.report.two_runs import build_page
from croco.storage.files import write_for_user
from croco.storage.records import state
from croco.storage.shards import shards


def page(folder: Path, say: Callable[[str], None]) -> str:
    """Make the page of a finished run, or of a study, again; returns a line that says where it is.

    Of a run that is not finished it prints how far it came and where rows went, and raises UserError."""
    recipe = read_recipe(folder)
    if recipe.study:
        return f"study: {study.write(_placed(folder), say)}"
    left = [title for title in _titles(recipe) if state(folder / title) != "complete"]
    if left:
        _print([terminal(progress(folder, recipe))])
        raise UserError(f"{folder} is not finished, so there is no page: `croco run` goes on with {left[0]}")
    return f"report: {run.rebuild_report(_placed(folder), say)}"


def _titles(recipe: Recipe) -> list[str]:
    return [node.title for node in nodes(recipe) if node.stage.name != "report"]


def progress(folder: Path, recipe: Recipe) -> Table:
    """Every stage with its state, what it read and kept, and its most frequent reasons to leave rows out."""
    stages = read_stages(folder, recipe)
    steps = {f"{step.stage}/{step.arm}".rstrip("/"): step for step in steps_of(folder, recipe, stages)}
    rows: list[list[Entry]] = []
    for title in _titles(recipe):
        made, step = stages.get(title, {}), steps.get(title)
        how_far = str(made.get("state", "not begun"))
        if how_far != "complete" and made:
            how_far = f"{len(shards(folder / title))} of {made.get('num_shards') or '?'} shards"
        flows = [
            f"{flow.written:,} of {count_of(flow.read, flow.unit)} kept"
            + "".join(f"; {count:,} {reason}" for reason, count in flow.reasons[:3])
            for flow in (step.flows if step else ())
        ]
        if not step and made:
            flows = [count_of(int(count), unit) for unit, count in made["counts"].get("written", {}).items()]
        rows.append([title, how_far, "\n".join(flows)])
    return Table(["stage", "state", "rows"], rows, 3, f"{recipe.run.name}: how far it came")


def _placed(folder: Path) -> Recipe:
    """The recipe of a run that may have been moved since."""
    return load(folder / "recipe.json", [f'run.folder="{folder}"'])


def beside(first: Path, second: Path, to: Path | None) -> Path:
    """Write one page of two runs, or of two studies; in the first's folder, named after the second's, by default."""
    path = to or first / f"beside-{second.resolve().name}.html"
    if read_recipe(first).study and read_recipe(second).study:
        write_for_user(path, study.together([_placed(first), _placed(second)], path.suffix == ".md"))
        return path
    _single(first)
    _single(second)
    write_for_user(path, build_page(first, second))
    return path


def _single(folder: Path) -> None:
    if read_recipe(folder).study:
        raise UserError(f"{folder} is a study, expected one run: those of its seeds lie in folders of it")


def show(folder: Path) -> None:
    """Print the tables that `croco run` ends with."""
    _single(folder)
    _print(results_terminal(folder))


def show_comparison(first: Path, second: Path) -> None:
    """Print what differs between two runs."""
    _single(first)
    _single(second)
    _print(comparison_terminal(compare(first, second)))


def _print(parts: Iterable[RenderableType]) -> None:
    console = Console()
    for part in parts:
        console.print(part)


def export(
    folder: Path, markdown: Path | None, csv: Path | None, latex: Path | None, intervals: bool
) -> list[Path]:
    """Write the tables of a run to the files that are named; returns those files."""
    writers = (
        (markdown, lambda: results_markdown(folder)),
        (csv, lambda: read_results(folder).results.write_csv()),
        (latex, lambda: results_latex(folder, intervals)),
    )
    wanted = [(path, write) for path, write in writers if path is not None]
    if wanted and wanted[0][0] == markdown and read_recipe(folder).study:
        wanted[0] = (markdown, lambda: (folder / "study.md").read_text(encoding="utf-8"))
    elif wanted:
        _single(folder)
    for path, write in wanted:
        write_for_user(path, write())
    return [path for path, _ in wanted]
