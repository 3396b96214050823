"""Results beside the scores: modes, languages, what to think of the arena's judge, structured tasks (EuroEval).

Nothing is averaged here: a correlation and an accuracy have no common mean, so every metric keeps its own line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from croco import languages
from croco.config.evaluation import VERSION
from croco.languages import RIGHT
from croco.report.load_run import Run
from croco.report.scores import ARENA, Board, Key, mark_best, metrics_of
from croco.report.table import (
    PERCENT,
    POINTS,
    SHARE,
    Entry,
    Number,
    Table,
    Unit,
    scope_name,
    temperature_name,
)
from croco.stages.evaluate.results import BASE, GROUPS, headline

TASK = Unit(digits=1)
# metric -> heading, unit
JUDGED = {
    "win-rate": ("win rate", SHARE),
    "lc-win-rate": ("length-controlled", SHARE),
    "tie": ("ties", SHARE),
    "self-consistency": ("both orders agree", SHARE),
    "position-bias": ("leans to the first shown", Unit(POINTS.factor, signed=True, suffix=" points")),
    "length-difference": ("characters longer", Unit(signed=True)),
    "right-language": ("right language", SHARE),
}


def judged(arena: Board, arms: Sequence[str]) -> Table | None:
    """The arena's figures over all languages, a row each."""
    return _of_all_languages(arena, [BASE, *arms], "figure", JUDGED)


def domains(arena: Board, arms: Sequence[str]) -> Table | None:
    """Win rates per domain of the prompts, over all languages."""
    names = sorted({m for of in arena.metrics.values() for m in of if m.startswith("win-rate:")})
    units = {name: (name.removeprefix("win-rate:").replace("_", " "), SHARE) for name in names}
    return _of_all_languages(arena, arms, "domain", units)


def _of_all_languages(
    arena: Board, arms: Sequence[str], head: str, units: Mapping[str, tuple[str, Unit]]
) -> Table | None:
    of = {arm: metrics for (arm, _, scope), metrics in arena.metrics.items() if scope == "all"}
    shown = [arm for arm in arms if any(metric in of.get(arm, {}) for metric in units)]
    rows: list[list[Entry]] = [
        [name, *(Number(of[arm][metric][0], unit) if metric in of[arm] else None for arm in shown)]
        for metric, (name, unit) in units.items()
        if any(metric in of[arm] for arm in shown)
    ]
    return Table([head, *shown], rows) if rows else None


def mode_shares(board: Board) -> dict[Key, dict[str, float]]:
    """The share of each mode, by (arm, temperature, language or group)."""
    return {
        key: {m.removeprefix("mode:"): i.value for m, (i, _) in of.items() if m.startswith("mode:")}
        for key, of in board.metrics.items()
        if any(metric.startswith("mode:") for metric in of)
    }


def modes_table(board: Board) -> Table:
    """Where the mass went: percent of completions in each mode, per group."""
    shares = mode_shares(board)
    modes = sorted({mode for of in shares.values() for mode in of})
    rows: list[list[Entry]] = [
        [
            arm,
            temperature_name(t),
            scope,
            *(PERCENT.text(shares.get((arm, t, scope), {}).get(m, 0.0)) for m in modes),
        ]
        for arm, t in board.settings
        for scope in board.main_groups
    ]
    return Table(["arm", "decoding", "group", *modes], rows, 3, "Percent of completions in each mode")


def fidelity_table(board: Board) -> Table | None:
    """The share of completions in the right language, of the prompts with one whose language could be told."""
    rows: list[list[Entry]] = []
    for arm, t in board.settings:
        row: list[Entry] = [arm, temperature_name(t)]
        for scope in board.groups:
            share, cell = board.metrics.get((arm, t, scope), {}).get(RIGHT), board.cell(arm, t, scope)
            row.append(
                Number(share[0], SHARE, n=f"{share[1]} of {cell.num_prompts}") if share and cell else None
            )
        rows += [row] if any(row[2:]) else []
    return Table(["arm", "decoding", *board.groups], rows, 2) if rows else None


def costs(run: Run) -> list[tuple[str, str]]:
    """What judging took and what got no verdict, per arm, as far as the stage recorded it."""
    lines = []
    for arm in run.recipe.evaluated_arms:
        facts: Mapping[str, Any] = run.stages.get(f"arena/{arm}", {}).get("facts", {})
        words = [
            f"{int(facts[name]):,} {label}"
            for name, label in (
                ("comparisons", "comparisons"),
                ("same_text", "of the same text twice"),
                ("inconsistent", "in which the two orders disagree"),
                ("judgements", "judgements"),
                ("judge_prompt_tokens", "tokens read by the judge"),
                ("judge_completion_tokens", "tokens written by it"),
            )
            if facts.get(name) is not None
        ]
        words += [f"{count:,} × {reason}" for reason, count in (facts.get("without_verdict") or {}).items()]
        if words:
            lines.append((arm, ", ".join(words)))
    return lines


def tasks(run: Run) -> Table | None:
    """Every metric of the benchmarks that are neither boards nor the arena: a row each, arms as columns."""
    arms = (BASE, *run.recipe.evaluated_arms)
    values: dict[tuple[str, str, str], dict[str, Number]] = {}
    for benchmark, metrics in metrics_of(run.results).items():
        if benchmark == ARENA or any(headline(benchmark) in of for of in metrics.values()):
            continue
        for (arm, _, scope), of in metrics.items():
            for metric, (interval, _) in of.items() if scope not in GROUPS else ():
                values.setdefault((scope, benchmark, metric), {})[arm] = Number(interval, TASK)
    order = {code: place for place, code in enumerate(run.recipe.run.evaluated)}
    rows: list[list[Entry]] = [
        [scope_name(key[0]), *key[1:], *mark_best([values[key].get(arm) for arm in arms])]
        for key in sorted(values, key=lambda key: (order.get(key[0], len(order)), key))
    ]
    return Table(["language", "dataset", "metric", *arms], rows, 3, "Structured tasks") if rows else None


def task_notes(run: Run) -> list[str]:
    """What a reader of the tasks has to know: how they were made, and what is not among them."""
    section = run.recipe.euroeval
    if section is None:
        return []
    lines = [
        f"EuroEval {VERSION}, split '{section.split}', {'few' if section.few_shot else 'zero'}-shot; its own metrics, "
        f"means and 95 % intervals over {section.iterations} iterations."
    ]
    if none := [code for code in run.recipe.run.evaluated if not section.datasets_of(code)]:
        lines.append(f"Not covered by EuroEval: {', '.join(map(languages.name, none))}.")
    if left_out := run.stages["results"]["facts"].get("datasets_left_out"):
        lines.append(f"Left out, since not every arm has them: {', '.join(left_out)}.")
    for arm in (BASE, *run.recipe.evaluated_arms):
        if failed := run.stages.get(f"euroeval/{arm}", {}).get("facts", {}).get("failed_instances"):
            counts = ", ".join(f"{dataset} {count:,}" for dataset, count in sorted(failed.items()))
            lines.append(f"Completions of {arm} in which EuroEval found no label or that failed: {counts}.")
    return lines
