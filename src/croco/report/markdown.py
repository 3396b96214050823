"""The tables of a run as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from croco.report.load_run import read_results
from croco.report.scores import (
    Board,
    Cell,
    arena_board,
    boards,
    interval_text,
    mode_shares,
    sentence,
    temperature_name,
)
from croco.report.tasks import tasks_markdown
from croco.stages.evaluate.results import BASE
from croco.storage.shards import read_record


def results_markdown(run_folder: Path) -> str:
    """The main tables of a run as Markdown: one sentence per arm, arms by groups, arms by language; 95 %
    intervals.
    """
    recipe, results = read_results(run_folder)
    made = read_record(run_folder / "results")
    versions = ", ".join(f"{name} {version}" for name, version in made.get("libraries", {}).items())
    parts = [
        f"# {recipe.run.name}\n\nMade by `croco run` and `croco report {recipe.folder} --markdown FILE`, never "
        f"by hand. {made.get('machine', '')}; {versions}.\n"
    ]
    for board in boards(results, recipe.evaluated_arms, recipe.run.evaluated):
        num_prompts = max(cell.num_prompts for cell in board.cells.values())
        unit = "percent of completions that are good" if board.is_share else "mean score"
        parts.append(f"### {board.title}\n\nIn {unit}; {num_prompts} prompts, 95 % intervals over prompts.\n")
        parts.append(
            "\n".join(f"- **{arm}**: {sentence(board, arm)}" for arm in recipe.evaluated_arms) + "\n"
        )
        parts.append(_markdown_table(board, board.groups, differences=False))
        parts.append("Differences from the base at the same temperature, and from the base at its best temperature ("
                     + ", ".join(f"{scope}: {temperature_name(board.best_base[scope])}" for scope in board.groups
                                 if scope in board.best_base) + "):\n")  # fmt: skip
        parts.append(_markdown_table(board, board.groups, differences=True))
        parts.append(_markdown_table(board, board.languages, differences=False))
        parts.append(_mode_table(board, mode_shares(results, board.benchmark)))
    if arena := arena_board(results, recipe.evaluated_arms, recipe.run.evaluated):
        parts.append(f"### {arena.title}\n\nWin rate in percent, ties a half; 95 % intervals over prompts.\n")
        parts.append(
            "\n".join(f"- **{arm}**: {sentence(arena, arm)}" for arm in recipe.evaluated_arms) + "\n"
        )
        parts.append(_markdown_table(arena, [*arena.groups, *arena.languages], differences=False))
    parts.append(tasks_markdown(run_folder, recipe))
    return "\n".join(parts)


def _markdown_table(board: Board, scopes: Sequence[str], differences: bool) -> str:
    head = ["arm", "decoding", *scopes]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * len(scopes)]
    for arm, temperature in board.settings:
        cells = [board.cell(arm, temperature, scope) for scope in scopes]
        if differences and arm == BASE:
            continue
        texts = [_difference_text(board, cell) if differences else _value_text(board, cell) for cell in cells]
        lines.append("| " + " | ".join([arm, temperature_name(temperature), *texts]) + " |")
    return "\n".join(lines) + "\n"


def _mode_table(board: Board, shares: Mapping[tuple[str, float, str], Mapping[str, float]]) -> str:
    """Where the mass went: percent of completions in each mode, per group."""
    modes = sorted({mode for found in shares.values() for mode in found})
    lines = [
        "Percent of completions in each mode:\n",
        "| arm | decoding | group | " + " | ".join(modes) + " |",
    ]
    lines.append("|---|---|---|" + "---:|" * len(modes))
    for arm, temperature in board.settings:
        for scope in (scope for scope in board.groups if scope != "all"):
            found = shares.get((arm, temperature, scope), {})
            cells = [f"{100 * found.get(mode, 0.0):.0f}" for mode in modes]
            lines.append("| " + " | ".join([arm, temperature_name(temperature), scope, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _value_text(board: Board, cell: Cell | None) -> str:
    return "" if cell is None else interval_text(board, cell.value)


def _difference_text(board: Board, cell: Cell | None) -> str:
    if cell is None:
        return ""
    shown = [interval_text(board, d, signed=True) for d in (cell.difference, cell.to_best) if d is not None]
    return " / ".join(shown)
