"""The page of two runs: each one's verdicts, what differs in their recipes and results, the training of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from croco.report import charts, curves, sections
from croco.report.compare import UNTUNED, Comparison, compare
from croco.report.load_run import Run, read_run
from croco.report.page import browsing, render
from croco.report.scores import Board, board_of, boards, sentence

HEADINGS = (
    ("verdict", "Verdict"),
    ("recipes", "Recipes"),
    ("results", "Results"),
    ("gains", "Intervals"),
    ("training", "Training"),
    ("browse", "Browse"),
)


def build_page(first: Path, second: Path) -> str:
    """The page as HTML. Raises UserError when a run is not complete or nothing can be compared."""
    runs = [read_run(folder) for folder in (first, second)]
    found = compare(first, second)
    return render(
        "beside.html",
        name=f"{found.names[0]} and {found.names[1]}",
        names=found.names,
        headings=HEADINGS,
        notes=found.notes,
        settings=found.settings,
        sides=[_side(name, run) for name, run in zip(found.names, runs, strict=True)],
        **_verdicts(found),
        drawn=[_drawn(found, board) for board in found.boards],
        series=list(enumerate(found.arms)),
        **_training(found, runs),
        **browsing(dict(zip(found.names, runs, strict=True))),
    )


def _side(name: str, run: Run) -> dict[str, Any]:
    """One run on its own: its facts, and a sentence per arm against its own base."""
    made = boards(run.results, run.recipe.evaluated_arms, run.recipe.run.evaluated)
    arms = [
        (arm, sections.about(run.recipe.arms[arm]), sentence(made[0], arm))
        for arm in run.recipe.evaluated_arms
    ]
    return {"name": name, "facts": sections.facts(run, made), "arms": arms}


def _verdicts(found: Comparison) -> dict[str, Any]:
    board = found.boards[0]
    drawn = charts.forests(board, found.arms, board.main_groups or board.languages)
    arms = [
        {
            "name": arm,
            "series": series,
            "sentence": sentence(board, arm),
            "strips": sections.strips_of(drawn, series),
        }
        for series, arm in enumerate(found.arms)
    ]
    return {
        "arms": arms,
        "scale": drawn[0] if drawn else None,
        "judged_on": board.title,
        "is_share": board.is_share,
    }


def _drawn(found: Comparison, board: Board) -> dict[str, Any]:
    """The heat maps of the change and of both runs' levels, and the forests."""
    members = {name: codes for name, codes in found.groups.items() if name != "all"}
    before = {key[1:]: cell for key, cell in found.firsts.items() if key[0] == board.benchmark}
    firsts = board_of(board.benchmark, before, found.arms, board.languages, {})
    change = f"{found.names[1]} minus {found.names[0]}"
    heats = charts.heats(board, members, (change, found.names[1]))
    heats += charts.heats(firsts, members, ("", found.names[0]))[-1:]
    return {
        "board": board,
        "heats": heats,
        "forests": charts.forests(board, found.arms, [*board.groups, *board.languages]),
    }


def _training(found: Comparison, runs: list[Run]) -> dict[str, Any]:
    """The curves of both runs in one panel each."""
    metrics = {
        f"{name}: {arm}": run.metrics[arm]
        for arm in found.arms
        if arm != UNTUNED
        for name, run in zip(found.names, runs, strict=True)
    }
    return {
        "panels": curves.panels(metrics, sections.CURVES) if metrics else [],
        "sentinel": curves.sentinel(metrics),
        "curve_series": list(enumerate(metrics)),
    }
