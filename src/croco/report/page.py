"""The report: one self-contained HTML page that says what a run found, and the stage that writes it.

Everything is in the page (style, script, figures, data), nothing is fetched, and whatever a model or a file wrote is
escaped: Jinja escapes all values, figures escape their text, and the pairs travel as JSON in which `<`, `>` and `&` are
written as escapes and are shown with `textContent`. Wording and layout live here and in `templates/`; numbers come from
`gather` and `tables`, drawings from `figures`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from croco.evaluation.results import BASE
from croco.evaluation.stats import verdict
from croco.recipe import Arm
from croco.report import figures
from croco.report.gather import Run, browser_pairs, pair_scores, read_run, scores_of
from croco.report.tables import Board, boards, mode_shares, scope_name, sentence, temperature_name
from croco.stage import Work
from croco.store import write_text

TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = (
    ("verdict", "Verdict"), ("results", "Results"), ("gains", "Gain per language"), ("modes", "Modes"),
    ("scores", "Chosen and rejected"), ("training", "Training"), ("pairs", "Pairs"), ("run", "What was run"),
)  # fmt: skip
CURVES = (
    ("loss", ("loss",), "Loss"),
    ("margins", ("rewards/margins",), "Reward margin"),
    ("accuracies", ("rewards/accuracies",), "Pairs ranked right"),
    ("logps", ("logps/chosen", "logps/rejected"), "Log-probability"),
)  # fmt: skip


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
    found = boards(run.results, list(run.recipe.arms), run.recipe.run.evaluated)
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
        **_gains(found),
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


def count_of(count: int, unit: str) -> str:
    """ "1 pair", "1,024 pairs"."""
    return f"{count:,} {unit}" if count == 1 else f"{count:,} {unit}s"


def _facts(run: Run, board: Board) -> list[tuple[str, str]]:
    recipe = run.recipe
    seconds = sum(float(stage.get("seconds") or 0) for stage in run.stages.values())
    num_tests = max(cell.num_prompts for cell in board.cells.values())
    scorers = {arm.scorer for arm in recipe.arms.values()}
    facts = [
        ("policy", recipe.policy.model),
        ("reward model", recipe.reward.model if "reward" in scorers else "not used"),
        ("tuned languages", " ".join(recipe.run.languages)),
        ("evaluated only", " ".join((*recipe.run.low_resource_languages, *recipe.run.held_out_languages)) or "none"),
        ("prompts to tune on", f"{_written(run, 'prompts', 'prompt'):,}"),
        ("completions", f"{_written(run, 'sample', 'completion'):,} ({recipe.sampling.completions} a prompt)"),
        ("test prompts", f"{num_tests:,} per language"),
        ("time of all stages", duration(seconds)),
    ]
    commit = run.stages["results"].get("commit")
    return [*facts, ("commit", commit[:12] if commit else "unknown"), ("finished", str(run.stages["results"]["time"])[:16])]


def _written(run: Run, stage: str, unit: str) -> int:
    return int(run.stages[stage]["counts"].get("written", {}).get(unit, 0))


def duration(seconds: float) -> str:
    """ "48 s", "3 min 20 s", "5 h 12 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def about(arm: Arm) -> str:
    """An arm in a few words: its pool, scorer, rule and method."""
    pool = "all languages" if arm.pool == "all" else "one language"
    scorer = {"reward": "reward model", "random": "random score", "likelihood": "policy's own likelihood"}[arm.scorer]
    loss = arm.training.method if arm.training.method == "sft" else f"{arm.training.method}, β {arm.training.beta:g}"
    nll = f", nll {arm.training.nll_weight:g}" if arm.training.nll_weight and arm.training.method == "dpo" else ""
    return f"pool: {pool}; {scorer}; rejected {arm.rejected}; {loss}{nll}"


def _scope_sizes(run: Run) -> dict[str, str]:
    groups = run.recipe.run
    sizes = {
        "tuned": groups.languages, "low-resource": groups.low_resource_languages,
        "held-out": groups.held_out_languages, "all": groups.evaluated,
    }  # fmt: skip
    return {name: count_of(len(codes), "language") for name, codes in sizes.items()}


def _verdicts(run: Run, found: list[Board]) -> dict[str, Any]:
    board, unit = found[0], "points" if found[0].is_share else "score"
    arms = []
    for name, arm in run.recipe.arms.items():
        to_best = sentence(board, name, to_best=True)
        arms.append({"name": name, "about": about(arm), "sentence": sentence(board, name), "to_best": to_best})
    best = ", ".join(f"{scope} {temperature_name(t)}" for scope in board.groups if (t := board.best_base.get(scope)) is not None)
    return {
        "arms": arms,
        "verdict_note": f"Differences from the base in {unit}, on {board.title[:1].lower()}{board.title[1:]}. Better or worse: "
        "the 95 % interval leaves out zero at every temperature; mixed: the temperatures disagree. The base's best "
        f"temperature ({best}) is picked on these very prompts, which favours the base.",
        "results_note": ("Percent of completions that are good" if board.is_share else "Mean score of the reward model")
        + ", with 95 % bootstrap intervals over prompts (a group resamples prompts jointly over its languages); beneath, "
        "the paired difference from the base at the same temperature.",
    }  # fmt: skip


def _gains(found: list[Board]) -> dict[str, Any]:
    boards_with_panels = []
    for place, board in enumerate(found):
        limits = figures.gain_limits(board)
        tuned = [arm for arm in dict.fromkeys(arm for arm, _ in board.settings) if arm != BASE]
        panels = [
            Panel(Markup(figures.gains(board, arm, f"gain{place}-{number}", limits)), arm)
            for number, arm in enumerate(tuned)
        ]
        boards_with_panels.append({"title": board.title, "panels": panels})
    return {
        "gains": boards_with_panels,
        "gain_legend": [(figures.variable(figures.SERIES[0]), "dot", "sampled"),
                        (figures.variable(figures.SERIES[1]), "ring", "greedy")],
        "gains_note": "Difference from the base at the same temperature, 95 % intervals. Intervals of single languages are "
        "not corrected for looking at many of them.",
    }  # fmt: skip


def _modes(run: Run, board: Board) -> dict[str, Any]:
    """Panels of mode shares: one row of panels per temperature, one panel per group, one bar per arm."""
    shares = mode_shares(run.results, board.benchmark)
    seen = {mode for modes in shares.values() for mode in modes}
    order = [mode for mode in figures.MODE_COLOURS if mode in seen] + sorted(seen - set(figures.MODE_COLOURS))
    groups = [scope for scope in board.groups if scope != "all"] or board.groups
    rows = []
    for temperature in sorted({t for arm, t in board.settings if arm != BASE}, reverse=True):
        panels = []
        for scope in groups:
            bars = {arm: shares[arm, t, scope] for arm, t in board.settings if t == temperature and (arm, t, scope) in shares}
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
        svg = figures.score_ridges(scores_of(run, name), pair_scores(run, name), run.recipe.run.languages, f"ridge{place}", name)
        ridges.append(Panel(Markup(svg), f"{name}: {arm.scorer} score"))
        facts = run.stages[f"pair/{name}"]["facts"]
        notes.append(
            f"{name}: pools of {facts['median_pool_size']} completions (median); the rule picked another completion than the "
            f"minimum in {facts['share_other_than_minimum']:.0%} of the pools."
        )
    legend = [(figures.variable(figures.MUTED), "area", "all candidates and completions"),
              (figures.variable(figures.CHOSEN), "line", "chosen"), (figures.variable(figures.REJECTED), "line", "rejected")]  # fmt: skip
    return {"ridges": ridges, "pool_notes": notes, "steps": run.steps, "score_legend": legend}


def _training(run: Run) -> dict[str, Any]:
    panels = []
    for name, columns, title in CURVES:
        shown = {arm: lines for arm, lines in run.metrics.items()}
        if any(line.get(column) is not None for lines in shown.values() for line in lines for column in columns):
            caption = f"{title} (dashed: rejected)" if len(columns) > 1 else title
            panels.append(Panel(Markup(figures.curves(shown, columns, f"curve-{name}", title)), caption))
    legend = [
        (figures.variable(figures.SERIES[place % len(figures.SERIES)]), "line", arm) for place, arm in enumerate(run.metrics)
    ]
    return {"curves": panels, "training_legend": legend}


def _provenance(run: Run) -> dict[str, Any]:
    stages = []
    for title, stage in run.stages.items():
        written = ", ".join(count_of(int(n), unit) for unit, n in stage["counts"].get("written", {}).items())
        stages.append({"title": title, "seconds": f"{float(stage.get('seconds') or 0):.1f}", "written": written,
                       "fingerprint": stage["fingerprint"]})  # fmt: skip
    last = run.stages["results"]
    libraries = ", ".join(f"{name} {version}" for name, version in last.get("libraries", {}).items())
    recipe = json.dumps(run.recipe.model_dump(mode="json"), indent=2, ensure_ascii=False)
    provenance = [("commit", last.get("commit") or "unknown"), ("machine", last.get("machine", "unknown")),
                  ("seed", str(run.recipe.run.seed)), ("libraries", libraries)]  # fmt: skip
    return {"stages": stages, "provenance": provenance, "recipe": recipe}
