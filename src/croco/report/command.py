"""What `croco report` and `croco compare` do once their arguments are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from croco.config.load import load
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.report.load_run import read_recipe
from croco.storage.shards import write_for_user


def page(folder: Path, say: Callable[[str], None]) -> str:
    """Make the page of a finished run, or of a study, again; returns a line that says where it is."""
    from croco.pipeline import run

    if read_recipe(folder).study:
        from croco.report.study_page import write

        return f"study: {write(_placed(folder), say)}"
    return f"report: {run.rebuild_report(_placed(folder), say)}"


def _placed(folder: Path) -> Recipe:
    """The recipe of a run that may have been moved since."""
    return load(folder / "recipe.json", [f'run.folder="{folder}"'])


def beside(first: Path, second: Path, to: Path | None) -> Path:
    """Write one page of two runs; in the first's folder, named after the second's, if not said otherwise."""
    from croco.report.two_runs import build_page

    _single(first)
    _single(second)
    made = build_page(first, second)
    path = to or first / f"beside-{second.resolve().name}.html"
    write_for_user(path, made)
    return path


def _single(folder: Path) -> None:
    if read_recipe(folder).study:
        raise UserError(f"{folder} is a study, expected one run: those of its seeds lie in folders of it")


def show(folder: Path) -> None:
    """Print the tables that `croco run` ends with."""
    from croco.report.tasks import tasks_table
    from croco.report.terminal import results_table

    _single(folder)
    console = Console()
    console.print(results_table(folder))
    if (tasks := tasks_table(folder)) is not None:
        console.print(tasks)


def show_comparison(first: Path, second: Path) -> None:
    """Print what differs between two runs."""
    from croco.report.compare import compare
    from croco.report.terminal import comparison

    _single(first)
    _single(second)
    console = Console()
    for part in comparison(compare(first, second)):
        console.print(part)


def export(
    folder: Path, markdown: Path | None, csv: Path | None, latex: Path | None, intervals: bool
) -> list[Path]:
    """Write the tables of a run to the files that are named; returns those files."""
    from croco.report.exports import results_csv, results_latex
    from croco.report.markdown import results_markdown

    if markdown and read_recipe(folder).study:
        write_for_user(markdown, (folder / "study.md").read_text(encoding="utf-8"))
        return [markdown]
    made = []
    for path, text in (
        (markdown, lambda: results_markdown(folder)),
        (csv, lambda: results_csv(folder)),
        (latex, lambda: results_latex(folder, intervals)),
    ):
        if path is not None:
            _single(folder)
            write_for_user(path, text())
            made.append(path)
    return made
