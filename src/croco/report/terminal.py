"""The last thing `croco run` prints: arms by groups of languages, with intervals, on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from croco.evaluation.results import BASE
from croco.evaluation.stats import verdict
from croco.recipe import load
from croco.report.tables import Board, Cell, boards, interval_text, temperature_name
from croco.store import read_table

COLOURS = {"better": "green", "worse": "red", "not resolved": ""}


def results_table(run_folder: Path) -> Table:
    """Arms × language groups of a finished run: value [95 % interval], and the difference from the base
    beneath.
    """
    recipe = load(run_folder / "recipe.json")
    found = boards(read_table(run_folder / "results"), recipe.evaluated_arms, recipe.run.evaluated)
    scopes = found[0].groups
    unit = "% good" if found[0].is_share else "mean score"
    table = Table(
        title=f"{recipe.run.name}: {unit} [95 % interval], difference from the base at the same temperature",
        title_justify="left",
    )
    table.add_column("arm", no_wrap=True)
    table.add_column("decoding", no_wrap=True)
    for scope in scopes:
        table.add_column(scope, justify="right")
    for board in found:
        if len(found) > 1:
            table.add_section()
            table.add_row(Text(board.title, style="bold"))
        for arm, temperature in board.settings:
            cells = [_text(board, board.cell(arm, temperature, scope)) for scope in scopes]
            table.add_row(
                Text(arm), temperature_name(temperature), *cells, style="dim" if arm == BASE else ""
            )
    return table


def _text(board: Board, cell: Cell | None) -> Text:
    if cell is None:
        return Text("")
    text = Text(interval_text(board, cell.value))
    if cell.difference is not None:
        text.append(
            f"\n{interval_text(board, cell.difference, signed=True)}", COLOURS[verdict(cell.difference)]
        )
    return text
