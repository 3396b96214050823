"""What a terminal shows: arms by groups of languages with intervals, and two runs beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from croco.report.compare import Comparison
from croco.report.load_run import read_results
from croco.report.scores import Board, Cell, arena_board, boards, interval_text, temperature_name
from croco.stages.evaluate.results import BASE
from croco.stages.evaluate.stats import verdict

COLOURS = {"better": "green", "worse": "red", "not resolved": ""}


def results_table(run_folder: Path) -> Table:
    """Arms × language groups of a finished run: value [95 % interval], and the difference from the base
    beneath.
    """
    recipe, results = read_results(run_folder)
    found = boards(results, recipe.evaluated_arms, recipe.run.evaluated)
    if arena := arena_board(results, recipe.evaluated_arms, recipe.run.evaluated):
        found.append(arena)
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


def comparison(found: Comparison) -> Iterator[RenderableType]:
    """What differs between two runs: sentences, settings, and the second's results against the first's."""
    first, second = found.names
    for note in found.notes:
        yield Text(note)
    if found.settings:
        settings = Table(title="What differs in the recipes", title_justify="left")
        for heading in ("key", first, second):
            settings.add_column(Text(heading), overflow="fold")
        for setting in found.settings:
            style = "dim" if setting.runtime else ""
            settings.add_row(Text(setting.key), Text(setting.first), Text(setting.second), style=style)
        yield settings
    else:
        yield Text("The recipes are the same.")
    for board in found.boards:
        scopes = board.groups or board.languages
        title = f"{board.title}: {first} → {second}, difference [95 % interval]"
        table = Table(title=title, title_justify="left")
        table.add_column("arm", no_wrap=True)
        table.add_column("decoding", no_wrap=True)
        for scope in scopes:
            table.add_column(scope, justify="right")
        for arm, temperature in board.settings:
            cells = [_change(found, board, arm, temperature, scope) for scope in scopes]
            table.add_row(Text(arm), temperature_name(temperature), *cells)
        yield table


def _change(found: Comparison, board: Board, arm: str, temperature: float, scope: str) -> Text:
    cell, before = (
        board.cell(arm, temperature, scope),
        found.firsts.get((board.benchmark, arm, temperature, scope)),
    )
    if cell is None or cell.difference is None or before is None:
        return Text("")
    text = Text(f"{board.number(before.value.value)} → {board.number(cell.value.value)}")
    colour = COLOURS[verdict(cell.difference)]
    return text.append(f"\n{interval_text(board, cell.difference, signed=True)}", colour)
