"""What `croco report` and `croco compare` do once their arguments are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from croco.recipe import load
from croco.report.gather import read_recipe
from croco.store import write_text


def page(folder: Path, say: Callable[[str], None]) -> Path:
    """Make the page of a finished run again, as its last stage."""
    from croco import pipeline

    read_recipe(folder)
    return pipeline.rebuild_report(load(folder / "recipe.json", [f'run.folder="{folder}"']), say)


def beside(first: Path, second: Path, to: Path | None) -> Path:
    """Write one page of two runs; in the first's folder, named after the second's, if not said otherwise."""
    from croco.report.beside import build_page

    made = build_page(first, second)
    path = to or first / f"beside-{second.resolve().name}.html"
    write_text(path, made)
    return path


def show(folder: Path) -> None:
    """Print the table that `croco run` ends with."""
    from croco.report.terminal import results_table

    Console().print(results_table(folder))


def show_comparison(first: Path, second: Path) -> None:
    """Print what differs between two runs."""
    from croco.report.compare import compare
    from croco.report.terminal import comparison

    console = Console()
    for part in comparison(compare(first, second)):
        console.print(part)


def export(
    folder: Path, markdown: Path | None, csv: Path | None, latex: Path | None, intervals: bool
) -> list[Path]:
    """Write the tables of a run to the files that are named; returns those files."""
    from croco.report.exports import results_csv, results_latex
    from croco.report.markdown import results_markdown

    made = []
    for path, text in (
        (markdown, lambda: results_markdown(folder)),
        (csv, lambda: results_csv(folder)),
        (latex, lambda: results_latex(folder, intervals)),
    ):
        if path is not None:
            write_text(path, text())
            made.append(path)
    return made
