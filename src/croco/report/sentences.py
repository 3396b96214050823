"""What became of an arm, in sentences: the page, the terminal and the exports say the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from croco.languages import RIGHT
from croco.pipeline.progress import count_of
from croco.report.scores import Board
from croco.report.table import PERCENT, SHARE, enumerate_words, temperature_name
from croco.stages.evaluate.results import BASE
from croco.stages.evaluate.stats import verdict


def left_out(facts: Mapping[str, Any]) -> str:
    """What the results lack, of what their stage recorded; "" where nothing."""
    parts = []
    if silent := facts.get("without_verdict"):
        names = enumerate_words([f"{arm} {_at(temperature)}" for arm, temperature in silent])
        parts.append(f"No completion of {names} has a verdict, so it is in no table.")
    for what, words in (
        ("prompt", "that some arm has no verdict on"),
        ("comparison", "on prompts that some arm lacks"),
    ):
        if num := facts.get(f"{what}s_left_out"):
            parts.append(f"{count_of(num, what)} {words} {'is' if num == 1 else 'are'} left out of all.")
    return " ".join(parts)


def in_words(boards: Sequence[Board], arm: str) -> str:
    """An arm on the first board, what it lost on the others, and its share in the right language."""
    parts = (sentence(boards[0], arm), losses(boards[1:], arm), language_sentence(boards[0], arm))
    return " ".join(filter(None, parts))


def language_sentence(board: Board, arm: str) -> str:
    """Where the share in the right language fell or rose: intervals apart from the base's at the same temperature."""
    changes: dict[str, list[str]] = {"falls": [], "rises": []}
    for scope in board.main_groups:
        for t in sorted(board.temperatures(arm), reverse=True):
            pair = [board.metrics.get((name, t, scope), {}).get(RIGHT) for name in (BASE, arm)]
            if pair[0] is None or pair[1] is None:
                continue
            (before, _), (after, _) = pair[0], pair[1]
            words = f"{scope} {PERCENT.text(before.value)} → {SHARE.text(after.value)} {_at(t)}"
            if after.high < before.low:
                changes["falls"].append(words)
            elif after.low > before.high:
                changes["rises"].append(words)
    parts = [f"{verb}: {enumerate_words(where)}" for verb, where in changes.items() if where]
    return f"The share in the right language {'; it '.join(parts)}." if parts else ""


def losses(boards: Sequence[Board], arm: str) -> str:
    """What an arm lost on other benchmarks than the one that its sentence is of; "" where nothing is worse."""
    parts = []
    for board in boards:
        worse = [
            f"{scope} {board.change.text(cell.difference.value)} {_at(t)}"
            for scope in board.main_groups
            for t in sorted(board.temperatures(arm), reverse=True)
            if (cell := board.cell(arm, t, scope)) and cell.difference and verdict(cell.difference) == "worse"
        ]
        if worse:
            parts.append(f"{board.title}: worse on {enumerate_words(worse)}.")
    return " ".join(parts)


def sentence(board: Board, arm: str, to_best: bool = False) -> str:
    """One sentence: in which groups the arm is better than the base, worse, mixed, or not told apart from it.

    Better (worse): at some temperature, and worse (better) at none. Mixed: better at one and worse at another. With
    `to_best` the rival is the base at its best temperature."""
    clauses: dict[str, list[str]] = {"better": [], "mixed": [], "not resolved": [], "worse": []}
    for scope in board.main_groups:
        differences = {}
        for temperature in sorted(board.temperatures(arm), reverse=True):
            cell = board.cell(arm, temperature, scope)
            difference = None if cell is None else (cell.to_best if to_best else cell.difference)
            if difference is not None:
                differences[temperature] = difference
        if not differences:
            continue
        verdicts = {verdict(difference) for difference in differences.values()}
        resolved = verdicts - {"not resolved"} or verdicts
        kind = "mixed" if len(resolved) > 1 else next(iter(resolved))
        words = [
            f"{board.change.text(d.value)} {_at(t)}"
            + (", not resolved" if len(verdicts) > 1 and verdict(d) == "not resolved" else "")
            for t, d in differences.items()
        ]
        between = "; " if len(resolved) < len(verdicts) else ", "
        clauses[kind].append(f"{scope} ({between.join(words)})")
    text = "; ".join(f"{kind} on {enumerate_words(scopes)}" for kind, scopes in clauses.items() if scopes)
    return f"{text[:1].upper()}{text[1:]}." if text else "Not compared with the base."


def _at(temperature: float) -> str:
    return temperature_name(temperature) if temperature == 0 else f"at {temperature_name(temperature)}"
