"""A finished run's tables for the terminal and as Markdown, LaTeX and CSV."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import RenderableType

from croco.report import diagnostics
from croco.report.compare import Comparison
from croco.report.load_run import Run, read_results
from croco.report.render import latex, parts_markdown, terminal, words
from croco.report.scores import ARENA, Board, arms_table, boards_of, mark_best
from croco.report.sentences import in_words, left_out
from croco.report.table import Entry, Number, Part, Table, temperature_name
from croco.stages.evaluate.results import groups_of


def results_terminal(run_folder: Path) -> Iterator[RenderableType]:
    """What `croco run` ends with: arms by groups, the structured tasks, and what became of each arm."""
    run = read_results(run_folder)
    made = boards_of(run)
    yield words(
        f"{run.recipe.run.name}: {made[0].measure}, ± half of the 95 % interval; beneath it the difference from the "
        "untuned base at the same temperature."
    )
    for board in made:
        more = ": win rate in percent; beneath it the difference from 50" if board.benchmark == ARENA else ""
        yield terminal(arms_table(board, made[0].groups, ("value", "difference"), board.title + more))
    if (tasks := diagnostics.tasks(run)) is not None:
        yield terminal(tasks)
        yield from map(words, diagnostics.task_notes(run))
    for arm in run.recipe.evaluated_arms:
        yield words(f"{arm}: {in_words(made, arm)}")
    if lacking := left_out(run.stages["results"].get("facts", {})):
        yield words(lacking)


def comparison_terminal(comparison: Comparison) -> Iterator[RenderableType]:
    """What differs between two runs: sentences, settings, and the second's results against the first's."""
    first, second = comparison.names
    yield from map(words, comparison.notes)
    if comparison.settings:
        settings = [[setting.key, setting.first, setting.second] for setting in comparison.settings]
        yield terminal(Table(["key", first, second], settings, 3, "What differs in the recipes"))
    else:
        yield words("The recipes are the same.")
    for board in comparison.boards:
        scopes = board.groups or board.languages
        rows: list[list[Entry]] = []
        for arm, t in board.settings:
            row: list[Entry] = [arm, temperature_name(t)]
            for scope in scopes:
                before = comparison.firsts.get((board.benchmark, arm, t, scope))
                values = (Number(before.value, board.unit),) if before else ()
                row.append((*values, *board.entry((arm, t), scope, ("value", "difference"))))
            rows.append(row)
        yield words(
            f"{board.title}: {first}, {second}, and the second minus the first; ± half of the 95 % interval."
        )
        yield terminal(Table(["arm", "decoding", *scopes], rows, 2))


def board_part(board: Board, sentences: Sequence[str] = ()) -> Part:
    """A benchmark: arms by group, their gains over the base, arms by language, and where the mass went."""
    tables = [arms_table(board, board.groups), arms_table(board, board.languages, title="By language")]
    best = [f"{s}: {temperature_name(board.best_base[s])}" for s in board.groups if s in board.best_base]
    if best:
        title = f"Gain over the base at the same temperature / over the base at its best ({', '.join(best)})"
        tables.insert(1, arms_table(board, board.groups, ("difference", "to_best"), title, base=False))
    if diagnostics.mode_shares(board):
        tables.append(diagnostics.modes_table(board))
    text = [
        f"{board.measure.capitalize()}; {board.num_prompts} prompts a language, 95 % intervals.",
        *sentences,
    ]
    return Part(f"arms-{board.benchmark}", board.title, text, tables)


def results_markdown(run_folder: Path) -> str:
    """A sentence per arm, arms by groups and by language, modes, arena and tasks, all with 95 % intervals."""
    run = read_results(run_folder)
    stage = run.stages["results"]
    versions = ", ".join(f"{name} {version}" for name, version in stage["libraries"].items())
    parts = [board_part(board, _sentences(run, board)) for board in boards_of(run)]
    if (tasks := diagnostics.tasks(run)) is not None:
        parts.append(Part("tasks", tasks.title, diagnostics.task_notes(run), [replace(tasks, title="")]))
    head = (
        f"# {run.recipe.run.name}\n\nMade by `croco run` and `croco report {run.recipe.folder} --markdown FILE`, never "
        f"by hand. {stage['machine']}; {versions}.\n\n"
    )
    return head + parts_markdown(parts)


def _sentences(run: Run, board: Board) -> list[str]:
    lines = "\n".join(f"- **{arm}**: {in_words([board], arm)}" for arm in run.recipe.evaluated_arms)
    return [lines, *filter(None, [left_out(run.stages["results"].get("facts", {}))])]


def results_latex(run_folder: Path, intervals: bool = False) -> str:
    """A table per benchmark and temperature, languages by group as columns, the best of a column in bold."""
    run = read_results(run_folder)
    name, members = run.recipe.run.name, groups_of(run.recipe)
    tables = [
        _latex_table(name, board, temperature, members, intervals)
        for board in boards_of(run)
        for temperature in sorted({t for _, t in board.settings})
    ]
    if (tasks := diagnostics.tasks(run)) is not None:
        tables += _latex_tasks(name, tasks)
    head = "% written by croco report --latex; needs \\usepackage{booktabs}"
    return "\n\n".join([head, *(latex(table, intervals) for table in tables)]) + "\n"


def _latex_table(
    name: str, board: Board, temperature: float, members: Mapping[str, Sequence[str]], intervals: bool
) -> Table:
    blocks = {
        group: here
        for group, codes in members.items()
        if group != "all" and (here := [code for code in codes if code in board.languages])
    }
    if groups := [group for group in board.groups if group != "all"]:
        blocks["by group"] = groups
    scopes = [scope for here in blocks.values() for scope in here]
    settings = [setting for setting in board.settings if setting[1] == temperature]
    columns = [
        mark_best([board.entry(setting, scope, ("value",)) for setting in settings]) for scope in scopes
    ]
    rows = [[arm, *(column[place] for column in columns)] for place, (arm, _) in enumerate(settings)]
    unit = "percent" if board.is_share else "mean score"
    title = f"{name}: {board.title}, {temperature_name(temperature)}, {unit}"
    title += ", 95 % intervals" if intervals else ""
    return Table(["arm", *scopes], rows, 1, title, [(group, len(here)) for group, here in blocks.items()])


def _latex_tasks(name: str, tasks: Table) -> Iterator[Table]:
    """The structured tasks of one language each, turned: arms as rows."""
    for language in dict.fromkeys(str(row[0]) for row in tasks.rows):
        of = [row for row in tasks.rows if row[0] == language]
        rows: list[list[Entry]] = [
            [arm, *(row[tasks.words + place] for row in of)]
            for place, arm in enumerate(tasks.head[tasks.words :])
        ]
        blocks = [(str(row[1]), 1) for row in of]
        yield Table(
            ["arm", *(str(row[2]) for row in of)], rows, 1, f"{name}: structured tasks, {language}", blocks
        )
