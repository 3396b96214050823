"""What each section of the page shows: the words and numbers that its template lays out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from croco.config.arms import Arm
from croco.pipeline.arms import contrasted
from croco.pipeline.progress import count_of
from croco.report import charts, curves, diagnostics
from croco.report.load_run import Run, scores_of
from croco.report.scores import ARENA, Board, arms_table, scorer_of
from croco.report.sentences import language_sentence, left_out, losses, sentence
from croco.report.table import Entry, Table, duration, scope_name, temperature_name
from croco.stages.evaluate.results import BASE, groups_of
from croco.storage import shards

HEADINGS = {
    "verdict": "Verdict", "results": "Results", "gains": "Intervals", "arena": "Arena", "tasks": "Tasks",
    "modes": "Completions", "scores": "Scores", "funnel": "Funnel", "training": "Training", "browse": "Browse",
    "run": "Run",
}  # fmt: skip
CURVES = {
    "loss": "Loss", "rewards/margins": "Reward margin", "rewards/accuracies": "Share of pairs ranked right",
    "rewards/chosen": "Reward of chosen", "rewards/rejected": "Reward of rejected",
    "logps/chosen": "Log-probability of chosen", "logps/rejected": "Log-probability of rejected",
}  # fmt: skip
SCORERS = {
    "reward": "reward model", "random": "random score", "likelihood": "policy's own likelihood",
    "likelihood-sum": "policy's own likelihood, summed", "verified": "verified quality",
    "implicit": "implicit reward", "alignment": "alignment with English",
}  # fmt: skip


def facts(run: Run, boards: Sequence[Board]) -> dict[str, str]:
    """What a reader wants to know before the results, in a few words each."""
    recipe = run.recipe
    untuned = (*recipe.run.low_resource_languages, *recipe.run.held_out_languages)
    prompts = _written(run, "translate" if recipe.translate else "prompts", "prompt")
    # of the base, and of arms that have their own
    sampled = sum(_written(run, name, "completion") for name in run.stages if name.split("/")[0] == "sample")
    scored = any(arm.scorer == "reward" for arm in recipe.arms.values())
    return {
        "policy": recipe.policy.model,
        "reward model": recipe.reward.name if scored else "not used",
        **({"answers scored by": scorer} if (scorer := scorer_of(recipe)) else {}),
        "tuned on": " ".join(recipe.run.languages),
        "evaluated only": " ".join(untuned) or "none",
        "prompts to tune on": f"{prompts:,}",
        "completions": f"{sampled:,} ({recipe.sampling.completions} a prompt)",
        # no prompt is in two benchmarks
        "test prompts": f"{sum(b.num_prompts for b in boards if b.benchmark != ARENA):,} per language",
        "time of all stages": duration(sum(float(made.get("seconds") or 0) for made in run.stages.values())),
    }


def _written(run: Run, stage: str, unit: str) -> int:
    return int(run.stages[stage]["counts"].get("written", {}).get(unit, 0))


def about(arm: Arm) -> str:
    """An arm in a few words: its pool, scorer, rule and method."""
    pool = {"all": "all languages", "language": "one language"}.get(str(arm.pool), "groups of languages")
    training = arm.training
    method = "DPO" if training.loss == "sigmoid" else training.loss
    loss = training.method if training.method == "sft" else f"{method}, β {training.beta:g}"
    nll = f", NLL {training.nll_weight:g}" if training.nll_weight and training.method == "dpo" else ""
    scorer = arm.reward.name if arm.reward else SCORERS[arm.scorer]
    return f"pool: {pool} · {scorer} · rejected {arm.rejected} · {loss}{nll}"


def evaluated(run: Run) -> list[tuple[int, str]]:
    """The arms that have results, each with its place among all arms, which is its colour and shape."""
    return [(place, arm) for place, arm in enumerate(run.recipe.arms) if run.recipe.arms[arm].evaluated]


def verdicts(run: Run, boards: Sequence[Board]) -> dict[str, Any]:
    """One card per arm: its sentence, what it lost, and the interval of every group at every temperature."""
    board = boards[0]
    best = [f"{s} {temperature_name(board.best_base[s])}" for s in board.groups if s in board.best_base]
    cards = cards_of(board, dict(evaluated(run)), list(run.recipe.arms))
    for card in cards["arms"]:
        name = card["name"]
        to_best = sentence(board, name, to_best=True) if board.best_base else ""
        card |= {
            "about": about(run.recipe.arms[name]),
            "alerts": [losses(boards[1:], name), language_sentence(board, name)],
            "to_best": to_best[:1].lower() + to_best[1:],
            "stopped": run.stages[f"train/{name}"].get("facts", {}).get("stopped"),
        }
    lacking = left_out(run.stages["results"].get("facts", {}))
    return {**cards, "best": ", ".join(best), "left_out": lacking}


def cards_of(board: Board, arms: Mapping[int, str], names: Sequence[str]) -> dict[str, Any]:
    """A card per arm (by its place among `names`): its sentence and its intervals, and what they were judged on."""
    drawn = charts.forests(board, names, board.main_groups or board.languages)
    cards = [
        {"name": arm, "series": series, "sentence": sentence(board, arm), "strips": strips_of(drawn, series)}
        for series, arm in arms.items()
    ]
    scale = drawn[0] if drawn else None
    return {"arms": cards, "scale": scale, "judged_on": board.title, "is_share": board.is_share}


def strips_of(drawn: Sequence[charts.Forest], series: int) -> list[tuple[str, str, charts.Mark]]:
    """The marks of one arm, by group or language and temperature."""
    return [
        (scope, temperature_name(forest.temperature), mark)
        for place, (scope, _, _) in enumerate(drawn[0].rows if drawn else [])
        for forest in drawn
        for mark in forest.rows[place][2]
        if mark.series == series
    ]


def results(run: Run, boards: list[Board]) -> dict[str, Any]:
    """Heat maps, forests and tables of every benchmark."""
    members = groups_of(run.recipe)
    every = members.pop("all")
    drawn = []
    for board in boards:
        codes = [code for of in members.values() for code in of if code in board.languages]
        groups = arms_table(board, board.groups, ("value", "difference"), f"{board.title}: groups")
        there = {scope: set(members.get(scope, every)) & set(board.languages) for scope in board.groups}
        sizes = [f"{scope}\n{count_of(len(of), 'language')}" for scope, of in there.items()]
        drawn.append({
            "board": board,
            "heats": charts.heats(board, members),
            "forests": charts.forests(board, list(run.recipe.arms), [*board.groups, *codes]),
            "tables": [replace(groups, head=[*groups.head[:2], *sizes]), languages_table(board)],
        })  # fmt: skip
    return {"drawn": drawn, "series": evaluated(run)}


def languages_table(board: Board) -> Table:
    """Languages as rows, arms and temperatures as columns."""
    head = ["language", *(f"{arm}\n{temperature_name(t)}" for arm, t in board.settings)]
    rows: list[list[Entry]] = [
        [
            f"{scope}\n{scope_name(scope)}",
            *(board.entry(s, scope, ("value", "difference")) for s in board.settings),
        ]
        for scope in board.languages
    ]
    return Table(head, rows, 1, f"{board.title}: languages")


def other_results(run: Run, board: Board | None) -> dict[str, Any]:
    """The arena, whose board is given, and the structured tasks; null in a run without them."""
    arms, arena = run.recipe.evaluated_arms, None
    if board is not None:
        members = {name: codes for name, codes in groups_of(run.recipe).items() if name != "all"}
        tables = (
            ("The judge", diagnostics.judged(board, arms)), ("Win rate by domain", diagnostics.domains(board, arms)),
        )  # fmt: skip
        arena = {
            "arms": [
                {"name": arm, "series": place, "sentence": sentence(board, arm)}
                for place, arm in evaluated(run)
            ],
            "heat": charts.heats(board, members)[0],
            "forests": charts.forests(board, list(run.recipe.arms), [*board.groups, *board.languages]),
            "tables": [(title, table) for title, table in tables if table],
            "costs": diagnostics.costs(run),
        }
    return {"arena": arena, "tasks": diagnostics.tasks(run), "task_notes": diagnostics.task_notes(run)}


def modes(run: Run, board: Board) -> dict[str, Any]:
    """Stacked bars of mode shares: per temperature and group, one bar per arm."""
    shares = diagnostics.mode_shares(board)
    there = {mode for of in shares.values() for mode in of}
    order = [*(mode for mode in charts.MODES if mode in there), *sorted(there - charts.MODES.keys())]
    legend = [(mode, mode.replace("-", " "), charts.MODES.get(mode, 7)) for mode in order]
    rows = []
    for temperature in sorted({t for arm, t in board.settings if arm != BASE}):
        panels = [
            (scope, [
                (arm, [(name, place, 100 * shares[arm, t, scope].get(mode, 0.0)) for mode, name, place in legend])
                for arm, t in board.settings if t == temperature and (arm, t, scope) in shares
            ])
            for scope in board.main_groups
        ]  # fmt: skip
        rows.append((charts.decoding_title(temperature), panels))
    title = "How completions fail, before and after" if board.is_share else "Language of the completions"
    return {
        "title": title,
        "rows": rows,
        "legend": [row[1:] for row in legend],
        "fidelity": diagnostics.fidelity_table(board),
    }


def distributions(run: Run) -> dict[str, Any]:
    """Score distributions of the arms that scored anything, and a note on each."""
    drawn = []
    for name, arm in run.recipe.arms.items():
        if not contrasted(arm):
            continue  # nothing was scored
        columns = ["chosen_language", "rejected_language", "chosen_score", "rejected_score"]
        pairs = shards.read_table(run.folder / "pair" / name, columns)
        ridges, ticks = curves.ridges(scores_of(run, name), pairs, run.recipe.run.languages)
        facts = run.stages[f"pair/{name}"]["facts"]
        note = ""
        if "share_other_than_minimum" in facts:  # an arm for SFT rejects nothing
            note = (
                f"Pools of {facts['median_pool_size']} completions (median); the rule picked another completion than "
                f"the minimum in {100 * facts['share_other_than_minimum']:.0f}\u00a0% of the pools."
            )
        if facts.get("shortcuts"):
            guesses = ", ".join(f"{guess} {auc:.2f}" for guess, auc in facts["shortcuts"].items())
            note += f" Chosen told from rejected by one trait alone, AUC: {guesses}."
        drawn.append({"arm": name, "scorer": arm.scorer, "ridges": ridges, "ticks": ticks, "note": note})
    return {"distributions": drawn}


def training(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The curves of every arm, and where training was stopped."""
    return {
        "curve_series": list(enumerate(metrics)),
        "panels": curves.panels(metrics, CURVES),
        "sentinel": curves.sentinel(metrics),
    }


def provenance(run: Run) -> dict[str, Any]:
    """What the run was made from: stages with fingerprints, versions, the resolved recipe."""
    rows = [
        [
            title, f"{float(made.get('seconds') or 0):,.1f}",
            ", ".join(count_of(int(n), unit) for unit, n in made["counts"].get("written", {}).items()),
            made["fingerprint"],
        ]
        for title, made in run.stages.items()
    ]  # fmt: skip
    last = run.stages["results"]
    return {
        "stages": Table(["stage", "seconds", "written", "fingerprint"], rows, 4),
        "provenance": {
            "commit": last.get("commit") or "unknown",
            "results of (UTC)": str(last["time"])[:16].replace("T", " "),
            "machine": last.get("machine", "unknown"),
            "seed": str(run.recipe.run.seed),
            "libraries": ", ".join(
                f"{name} {version}" for name, version in last.get("libraries", {}).items()
            ),
        },
        "recipe": json.dumps(run.recipe.model_dump(mode="json"), indent=2, ensure_ascii=False),
    }
