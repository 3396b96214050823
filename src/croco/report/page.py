"""The report: one self-contained HTML page that says what a run found, and the stage that writes it.

Everything is in the page (style, script, figures, data), nothing is fetched, and whatever a model or a file
wrote is escaped: Jinja escapes all values, figures escape their text, and the pairs travel as JSON in which
`<`, `>` and `&` are written as escapes and are shown with `textContent`. Wording and layout live here and in
`templates/`; numbers come from `gather` and `tables`, drawings from `figures`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from croco.evaluation.results import BASE, language_groups
from croco.evaluation.stats import verdict
from croco.recipe import Arm
from croco.report import figures
from croco.report.gather import Run, browser_pairs, pair_scores, read_run, scores_of
from croco.report.tables import (
    Board,
    boards,
    count_of,
    duration,
    mode_shares,
    scope_name,
    sentence,
    temperature_name,
)
from croco.stage import Work
from croco.store import write_text

TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = (
    ("verdict", "Verdict"),
    ("results", "Results"),
    ("gains", "Gain per language"),
    ("modes", "Modes"),
    ("scores", "Chosen and rejected"),
    ("training", "Training"),
    ("pairs", "Pairs"),
    ("run", "What was run"),
)
CURVES = {
    "loss": "Loss",
    "rewards/margins": "Reward margin",
    "rewards/accuracies": "Share of pairs ranked right",
    "rewards/chosen": "Reward of chosen",
    "rewards/rejected": "Reward of rejected",
    "logps/chosen": "Log-probability of chosen",
    "logps/rejected": "Log-probability of rejected",
}


@dataclass(frozen=True)
class Panel:
    """A figure with its caption."""

    svg: Markup
    caption: str


def report(work: Work) -> None:
    """Write the page of the run that `work.folder` lies in to `report.html`."""
    write_text(work.folder / "report.html", build_page(work.folder.parent))


def build_page(run_folder: Path) -> str:
    """The page of a finished run, as HTML. Raises UserError when the run is not complete."""
    run = read_run(run_folder)
    found = boards(run.results, run.recipe.evaluated_arms, run.recipe.run.evaluated)
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        loader=FileSystemLoader(TEMPLATES),
    )
    return environment.get_template("page.html").render(
        name=run.recipe.run.name,
        sections=SECTIONS,
        facts=_facts(run, found[0]),
        boards=found,
        board_arms=lambda board: list(dict.fromkeys(arm for arm, _ in board.settings)),
        scope_sizes=_scope_sizes(run),
        scope_name=scope_name,
        temperature_name=temperature_name,
        verdict=verdict,
        count_of=count_of,
        **_verdicts(run, found),
        **_gains(run, found),
        modes=_modes(run, found[0]),
        **_data(run),
        **_training(run),
        **_provenance(run),
        pairs=json_for_html(browser_pairs(run)),
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "browser.js").read_text(encoding="utf-8")),
    )


def json_for_html(value: Any) -> Markup:
    """JSON that is safe inside a <script> element: no character in it can end the element or begin markup."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _facts(run: Run, board: Board) -> list[tuple[str, str]]:
    recipe = run.recipe
    seconds = sum(float(stage.get("seconds") or 0) for stage in run.stages.values())
    num_tests = max(cell.num_prompts for cell in board.cells.values())
    scorers = {arm.scorer for arm in recipe.arms.values()}
    facts = [
        ("policy", recipe.policy.model),
        ("reward model", recipe.reward.model if "reward" in scorers else "not used"),
        ("tuned languages", " ".join(recipe.run.languages)),
        (
            "evaluated only",
            " ".join((*recipe.run.low_resource_languages, *recipe.run.held_out_languages)) or "none",
        ),
        (
            "prompts to tune on",
            f"{_written(run, 'translate' if recipe.translate else 'prompts', 'prompt'):,}",
        ),
        (
            "completions",
            f"{_sampled(run):,} ({recipe.sampling.completions} a prompt)",
        ),
        ("test prompts", f"{num_tests:,} per language"),
        ("time of all stages", duration(seconds)),
    ]
    commit = run.stages["results"].get("commit")
    return [
        *facts,
        ("commit", commit[:12] if commit else "unknown"),
        ("results of (UTC)", str(run.stages["results"]["time"])[:16].replace("T", " ")),
    ]


def _written(run: Run, stage: str, unit: str) -> int:
    return int(run.stages[stage]["counts"].get("written", {}).get(unit, 0))


def _sampled(run: Run) -> int:
    """Completions of the base and of arms that have their own."""
    return sum(_written(run, name, "completion") for name in run.stages if name.split("/")[0] == "sample")


SCORERS = {
    "reward": "reward model",
    "random": "random score",
    "likelihood": "policy's own likelihood",
    "likelihood-sum": "policy's own likelihood, summed",
    "verified": "verified quality",
    "implicit": "implicit reward",
    "alignment": "alignment with English",
}


def about(arm: Arm) -> str:
    """An arm in a few words: its pool, scorer, rule and method."""
    pool = "all languages" if arm.pool == "all" else "one language"
    scorer = SCORERS[arm.scorer]
    loss = (
        arm.training.method
        if arm.training.method == "sft"
        else f"{arm.training.method}, β {arm.training.beta:g}"
    )
    nll = (
        f", nll {arm.training.nll_weight:g}"
        if arm.training.nll_weight and arm.training.method == "dpo"
        else ""
    )
    return f"pool: {pool}; {scorer}; rejected {arm.rejected}; {loss}{nll}"


def _scope_sizes(run: Run) -> dict[str, str]:
    groups = run.recipe.run
    sizes = {
        "tuned": groups.languages,
        "low-resource": groups.low_resource_languages,
        "held-out": groups.held_out_languages,
        "all": groups.evaluated,
    }
    return {name: count_of(len(codes), "language") for name, codes in sizes.items()}


def _verdicts(run: Run, found: list[Board]) -> dict[str, Any]:
    board = found[0]
    arms = []
    for name in run.recipe.evaluated_arms:
        arm = run.recipe.arms[name]
        to_best = sentence(board, name, to_best=True)
        to_best = to_best[:1].lower() + to_best[1:] if board.best_base else ""
        arms.append(
            {"name": name, "about": about(arm), "sentence": sentence(board, name), "to_best": to_best}
        )
    best = ", ".join(
        f"{scope} {temperature_name(t)}"
        for scope in board.groups
        if (t := board.best_base.get(scope)) is not None
    )
    return {
        "arms": arms,
        "best": best,
        "is_share": board.is_share,
        "left_out": run.stages["results"].get("facts", {}).get("prompts_left_out", 0),
        "judged_on": board.title,
    }


def _gains(run: Run, found: list[Board]) -> dict[str, Any]:
    boards_with_panels = []
    groups = run.recipe.run
    members = language_groups(groups.languages, groups.low_resource_languages, groups.held_out_languages)
    del members["all"]
    temperatures = {t for board in found for arm, t in board.settings if arm != BASE}
    for place, board in enumerate(found):
        limits = figures.gain_limits(board)
        tuned = [arm for arm in dict.fromkeys(arm for arm, _ in board.settings) if arm != BASE]
        panels = [
            Panel(Markup(figures.gains(board, arm, members, f"gain{place}-{number}", limits)), arm)
            for number, arm in enumerate(tuned)
        ]
        boards_with_panels.append({"title": board.title, "panels": panels})
    return {
        "gains": boards_with_panels,
        "gain_legend": [
            (figures.variable(colour), "ring" if t == 0 else "dot", temperature_name(t))
            for t, colour in figures.temperature_colours(temperatures).items()
        ],
    }


def _modes(run: Run, board: Board) -> dict[str, Any]:
    """Panels of mode shares: one row of panels per temperature, one panel per group, one bar per arm."""
    shares = mode_shares(run.results, board.benchmark)
    seen = {mode for modes in shares.values() for mode in modes}
    order = [mode for mode in figures.MODE_COLOURS if mode in seen] + sorted(seen - set(figures.MODE_COLOURS))
    groups = [scope for scope in board.groups if scope != "all"] or board.groups
    rows: list[dict[str, Any]] = []
    for temperature in sorted({t for arm, t in board.settings if arm != BASE}, reverse=True):
        panels: list[Panel] = []
        for scope in groups:
            bars = {
                arm: shares[arm, t, scope]
                for arm, t in board.settings
                if t == temperature and (arm, t, scope) in shares
            }
            name = f"modes-{len(rows)}-{len(panels)}"
            description = f"Share of each mode on {scope}, {temperature_name(temperature)}"
            panels.append(Panel(Markup(figures.modes(bars, order, name, description)), scope))
        title = "Greedy" if temperature == 0 else f"Sampled at T = {temperature:g}"
        rows.append({"title": title, "panels": panels})
    legend = [(figures.variable(figures.mode_colour(mode)), "", mode.replace("-", " ")) for mode in order]
    title = "How completions fail, before and after" if board.is_share else "Language of the completions"
    return {"title": title, "rows": rows, "legend": legend}


def _data(run: Run) -> dict[str, Any]:
    ridges, notes = [], []
    for place, (name, arm) in enumerate(run.recipe.arms.items()):
        if (arm.chosen, arm.rejected) == ("reference", "none"):
            continue  # nothing was scored
        svg = figures.score_ridges(
            scores_of(run, name), pair_scores(run, name), run.recipe.run.languages, f"ridge{place}", name
        )
        ridges.append(Panel(Markup(svg), f"{name}: {arm.scorer} score"))
        facts = run.stages[f"pair/{name}"]["facts"]
        if "share_other_than_minimum" in facts:  # an arm for SFT rejects nothing
            share = f"{100 * facts['share_other_than_minimum']:.0f}\u00a0%"
            guesses = ", ".join(f"{guess} {auc:.2f}" for guess, auc in facts.get("shortcuts", {}).items())
            notes.append((name, facts["median_pool_size"], share, guesses))
    legend = [
        (figures.variable(figures.MUTED), "area", "all completions"),
        (figures.variable(figures.CHOSEN), "line", "chosen"),
        (figures.variable(figures.REJECTED), "line", "rejected"),
    ]
    return {"ridges": ridges, "pool_notes": notes, "steps": run.steps, "score_legend": legend}


def _training(run: Run) -> dict[str, Any]:
    panels = []
    for number, (column, title) in enumerate(CURVES.items()):
        if any(line.get(column) is not None for lines in run.metrics.values() for line in lines):
            panels.append(Panel(Markup(figures.curves(run.metrics, column, f"curve{number}", title)), title))
    legend = [
        (figures.variable(figures.SERIES[place % len(figures.SERIES)]), "line", arm)
        for place, arm in enumerate(run.metrics)
    ]
    return {"curves": panels, "training_legend": legend}


def _provenance(run: Run) -> dict[str, Any]:
    stages = []
    for title, stage in run.stages.items():
        written = ", ".join(count_of(int(n), unit) for unit, n in stage["counts"].get("written", {}).items())
        stages.append(
            {
                "title": title,
                "seconds": f"{float(stage.get('seconds') or 0):.1f}",
                "written": written,
                "fingerprint": stage["fingerprint"],
            }
        )
    last = run.stages["results"]
    libraries = ", ".join(f"{name} {version}" for name, version in last.get("libraries", {}).items())
    recipe = json.dumps(run.recipe.model_dump(mode="json"), indent=2, ensure_ascii=False)
    provenance = [
        ("commit", last.get("commit") or "unknown"),
        ("machine", last.get("machine", "unknown")),
        ("seed", str(run.recipe.run.seed)),
        ("libraries", libraries),
    ]
    return {"stages": stages, "provenance": provenance, "recipe": recipe}
