"""The page of two runs: each one's verdicts, what differs in their recipes and results, the training of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from croco.report import charts, sections
from croco.report.compare import UNTUNED, Comparison, compare
from croco.report.load_run import Run, read_run
from croco.report.page import browsing, render
from croco.report.scores import Board, board_of, boards_of
from croco.report.sentences import sentence

HEADINGS = {
    "verdict": "Verdict", "recipes": "Recipes", "results": "Results", "gains": "Intervals", "training": "Training",
    "browse": "Browse",
}  # fmt: skip


def build_page(first: Path, second: Path) -> str:
    """The page as HTML. Raises UserError when a run is not complete or nothing can be compared."""
    runs = [read_run(folder) for folder in (first, second)]
    comparison = compare(first, second)
    named = dict(zip(comparison.names, runs, strict=True))
    tuned = [arm for arm in comparison.arms if arm != UNTUNED]
    metrics = {f"{name}: {arm}": run.metrics[arm] for arm in tuned for name, run in named.items()}
    return render(
        "beside.html",
        name=f"{comparison.names[0]} and {comparison.names[1]}",
        names=comparison.names,
        headings=HEADINGS,
        notes=comparison.notes,
        settings=comparison.settings,
        sides=[_side(name, run) for name, run in named.items()],
        **sections.cards_of(comparison.boards[0], dict(enumerate(comparison.arms)), comparison.arms),
        drawn=[_drawn(comparison, board) for board in comparison.boards],
        series=list(enumerate(comparison.arms)),
        **sections.training(metrics),
        **browsing(named),
    )


def _side(name: str, run: Run) -> dict[str, Any]:
    """One run on its own: its facts, and a sentence per arm against its own base."""
    arms, made = run.recipe.arms, boards_of(run)
    words = [(arm, sections.about(arms[arm]), sentence(made[0], arm)) for arm in run.recipe.evaluated_arms]
    return {"name": name, "facts": sections.facts(run, made), "arms": words}


def _drawn(comparison: Comparison, board: Board) -> dict[str, Any]:
    """The heat maps of the change and of both runs' levels, and the forests."""
    members = {name: codes for name, codes in comparison.groups.items() if name != "all"}
    before = {key[1:]: cell for key, cell in comparison.firsts.items() if key[0] == board.benchmark}
    firsts = board_of(board.benchmark, before, comparison.arms, board.languages, {})
    heats = charts.heats(
        board, members, (f"{comparison.names[1]} minus {comparison.names[0]}", comparison.names[1])
    )
    heats += charts.heats(firsts, members, ("", comparison.names[0]))[-1:]
    scopes = [*board.groups, *board.languages]
    return {"board": board, "heats": heats, "forests": charts.forests(board, comparison.arms, scopes)}
