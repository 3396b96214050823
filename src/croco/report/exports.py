"""A finished run's tables for the terminal and as Markdown, LaTeX and CSV."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import RenderableType

from croco.report import diagnostics
from croco.report.compare import Comparison
from croco.report.load_run import Run, read_results
from croco.report.render import latex, markdown, terminal, words
from croco.report.scores import (
    Board,
    arena_board,
    arms_table,
    boards,
    language_sentence,
    mark_best,
    scorer_of,
    sentence,
)
from croco.report.table import Entry, Number, Table, temperature_name
from croco.stages.evaluate.results import language_groups


def _boards(run: Run) -> tuple[list[Board], Board | None]:
    arms, codes = run.recipe.evaluated_arms, run.recipe.run.evaluated
    return boards(run.results, arms, codes, scorer_of(run.recipe)), arena_board(run.results, arms, codes)


def _tasks(run: Run) -> Table | None:
    return diagnostics.tasks(run.results, run.recipe.evaluated_arms, run.recipe.run.evaluated)


def results_terminal(run_folder: Path) -> Iterator[RenderableType]:
    """What `croco run` ends with: arms by groups, the structured tasks, and what became of each arm."""
    run = read_results(run_folder)
    made, arena = _boards(run)
    unit = "percent of completions that are good" if made[0].is_share else "mean score"
    yield words(
        f"{run.recipe.run.name}: {unit}, ± half of the 95 % interval; beneath it the difference from the untuned base "
        "at the same temperature."
    )
    for board in made:
        yield terminal(arms_table(board, made[0].groups, ("value", "difference"), board.title))
    if arena:
        title = f"{arena.title}: win rate in percent; beneath it the difference from 50"
        yield terminal(arms_table(arena, made[0].groups, ("value", "difference"), title))
    if (tasks := _tasks(run)) is not None:
        yield terminal(tasks)
        yield from map(words, diagnostics.task_notes(run))
    for arm in run.recipe.evaluated_arms:
        yield words(f"{arm}: {_words(made[0], arm)}")


def _words(board: Board, arm: str) -> str:
    return " ".join(filter(None, [sentence(board, arm), language_sentence(board, arm)]))


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


def results_markdown(run_folder: Path) -> str:
    """A sentence per arm, arms by groups and by language, modes, arena and tasks, all with 95 % intervals."""
    run = read_results(run_folder)
    stage = run.stages["results"]
    versions = ", ".join(f"{name} {version}" for name, version in stage["libraries"].items())
    parts = [
        f"# {run.recipe.run.name}\n\nMade by `croco run` and `croco report {run.recipe.folder} --markdown FILE`, never "
        f"by hand. {stage['machine']}; {versions}.\n"
    ]
    made, arena = _boards(run)
    for board in made:
        unit = "percent of completions that are good" if board.is_share else "mean score"
        best = [f"{s}: {temperature_name(board.best_base[s])}" for s in board.groups if s in board.best_base]
        parts += [
            f"### {board.title}\n\nIn {unit}; {board.num_prompts} prompts, 95 % intervals over prompts.\n",
            _sentences(run, board),
            markdown(arms_table(board, board.groups)),
            "Differences from the base at the same temperature, and from the base at its best temperature "
            f"({', '.join(best)}):\n",
            markdown(arms_table(board, board.groups, ("difference", "to_best"), base=False)),
            markdown(arms_table(board, board.languages)),
            f"Percent of completions in each mode:\n\n{markdown(diagnostics.modes_table(board))}",
        ]
    if arena:
        parts += [
            f"### {arena.title}\n\nWin rate in percent, ties a half; 95 % intervals over prompts.\n",
            _sentences(run, arena),
            markdown(arms_table(arena, [*arena.groups, *arena.languages])),
        ]
    if (tasks := _tasks(run)) is not None:
        notes = "".join(f"- {line}\n" for line in diagnostics.task_notes(run))
        parts += [f"### {tasks.title}\n", notes, markdown(tasks)]
    return "\n".join(filter(None, parts))


def _sentences(run: Run, board: Board) -> str:
    return "".join(f"- **{arm}**: {_words(board, arm)}\n" for arm in run.recipe.evaluated_arms)


def results_csv(run_folder: Path) -> str:
    """All rows of the results table, as they are stored."""
    return read_results(run_folder).results.write_csv()


def results_latex(run_folder: Path, intervals: bool = False) -> str:
    """A table per benchmark and temperature, languages by group as columns, the best of a column in bold."""
    run = read_results(run_folder)
    name, groups = run.recipe.run.name, run.recipe.run
    members = language_groups(groups.languages, groups.low_resource_languages, groups.held_out_languages)
    made, arena = _boards(run)
    tables = [
        _latex_table(name, board, temperature, members, intervals)
        for board in [*made, *([arena] if arena else [])]
        for temperature in sorted({t for _, t in board.settings})
    ]
    if (tasks := _tasks(run)) is not None:
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
