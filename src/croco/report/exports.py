"""Results for other programs: CSV with every row of the table, LaTeX in the layout of the paper.

The LaTeX has one table per benchmark and temperature: arms as rows, languages as columns by group, the best of a column
in bold. It needs the package booktabs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from croco.report.diagnostics import Task, tasks
from croco.report.load_run import read_results
from croco.report.scores import Board, Cell, arena_board, boards, temperature_name
from croco.stages.evaluate.results import language_groups

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$",
}  # fmt: skip


def results_csv(run_folder: Path) -> str:
    """All rows of the results table."""
    return read_results(run_folder)[1].write_csv()


def results_latex(run_folder: Path, intervals: bool = False) -> str:
    """All results as LaTeX tables, with 95 % intervals in small type where asked for."""
    recipe, results = read_results(run_folder)
    arms, codes, run = recipe.evaluated_arms, recipe.run.evaluated, recipe.run
    members = language_groups(run.languages, run.low_resource_languages, run.held_out_languages)
    found = boards(results, arms, codes)
    arena = arena_board(results, arms, codes)
    parts = ["% written by croco report --latex; needs \\usepackage{booktabs}"]
    for board in [*found, *([arena] if arena else [])]:
        for temperature in sorted({t for _, t in board.settings}):
            parts.append(_table(recipe.run.name, board, temperature, members, intervals))
    every = tasks(results, arms, codes)
    for language in dict.fromkeys(task.language for task in every):
        part = [task for task in every if task.language == language]
        parts.append(_task_table(recipe.run.name, ["base", *arms], language, part, intervals))
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Text that LaTeX sets as it stands."""
    return re.sub(r"[\\{}$&%#_~^−]", lambda match: _SPECIAL[match[0]], text)


def _table(
    name: str, board: Board, temperature: float, members: Mapping[str, Sequence[str]], intervals: bool
) -> str:
    blocks = {
        group: here
        for group, codes in members.items()
        if group != "all" and (here := [code for code in codes if code in board.languages])
    }
    columns = [code for here in blocks.values() for code in here]
    groups = [group for group in board.groups if group != "all"]
    arms = [arm for arm, t in board.settings if t == temperature]
    heads = [rf"\multicolumn{{{len(here)}}}{{c}}{{{escape(group)}}}" for group, here in blocks.items()]
    if groups:
        heads.append(rf"\multicolumn{{{len(groups)}}}{{c}}{{by group}}")
    ends, rules, start = [*map(len, blocks.values()), *([len(groups)] if groups else [])], [], 2
    for width in ends:
        rules.append(rf"\cmidrule(lr){{{start}-{start + width - 1}}}")
        start += width
    scopes = [*columns, *groups]
    cells = {scope: [board.cell(arm, temperature, scope) for arm in arms] for scope in scopes}
    best = {scope: _best(board, column) for scope, column in cells.items()}
    rows = []
    for place, arm in enumerate(arms):
        texts = [_cell(board, cells[scope][place], place in best[scope], intervals) for scope in scopes]
        rows.append(" & ".join([escape(arm), *texts]) + r" \\")
    unit = "percent" if board.is_share else "mean score"
    caption = f"{name}: {board.title}, {temperature_name(temperature)}, {unit}"
    return _tabular(
        caption + (", 95 % intervals" if intervals else ""),
        "l" + "r" * len(scopes),
        [
            " & ".join(["", *heads]) + r" \\",
            " ".join(rules),
            " & ".join(["arm", *map(escape, scopes)]) + r" \\",
        ],
        rows,
    )


def _best(board: Board, column: Sequence[Cell | None]) -> set[int]:
    """The places of the highest value of a column as it is printed; none where all print the same."""
    printed = [None if cell is None else board.number(cell.value.value) for cell in column]
    there = [cell.value.value for cell in column if cell is not None]
    if len({text for text in printed if text is not None}) < 2:
        return set()
    return {place for place, text in enumerate(printed) if text == board.number(max(there))}


def _cell(board: Board, cell: Cell | None, best: bool, intervals: bool) -> str:
    if cell is None:
        return "--"
    value, low, high = (escape(board.number(end)) for end in cell.value)
    text = rf"\textbf{{{value}}}" if best else value
    return text + (rf" {{\tiny [{low}, {high}]}}" if intervals else "")


def _task_table(name: str, arms: Sequence[str], language: str, part: Sequence[Task], intervals: bool) -> str:
    rows = []
    for place, arm in enumerate(arms):
        texts = []
        for task in part:
            found = task.texts[place]
            text = "--" if found is None else escape(found[0])
            text = rf"\textbf{{{text}}}" if task.best[place] else text
            texts.append(text + (rf" {{\tiny [{escape(found[1])}]}}" if intervals and found else ""))
        rows.append(" & ".join([escape(arm), *texts]) + r" \\")
    heads = [
        " & ".join(["", *(escape(task.dataset) for task in part)]) + r" \\",
        " & ".join(["arm", *(escape(task.metric) for task in part)]) + r" \\",
    ]
    return _tabular(f"{name}: structured tasks, {language}", "l" + "r" * len(part), heads, rows)


def _tabular(caption: str, columns: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering\small",
            rf"\caption{{{escape(caption)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            *heads,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )
