"""The command line: parse, then import what the command needs. `croco --help` loads no torch and no Polars.

Here are the commands about runs; `cli/files.py` has those about files, `cli/app.py` what all share.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from croco import __version__
from croco.cli.app import (  # fmt: skip
    Limit,
    Overrides,
    Rebuild,
    RecipePath,
    app,
    euroeval,
    load_recipe,
    say,
    stage_command,
)
from croco.cli.files import chat, export, fetch, merge, pairs, push, score, train
from croco.errors import UserError

# one command per stage; a test holds these against pipeline.STAGES, which is not imported to show a help page
STAGE_COMMANDS = {
    "prompts": "Read and check the prompts to tune on.",
    "translate": "Translate the prompts to tune on, if the recipe says so.",
    "sample": "Let the policy answer every prompt N times.",
    "score": "Score the completions; with --diagnose, measure reward models on preference pairs.",
    "score-references": "Score the gold completions, where an arm sets them against the policy's.",
    "pair": "Choose a chosen and a rejected completion per pool.",
    "train": "Tune an adapter on an arm's pairs.",
    "eval-prompts": "Read and check the prompts to evaluate on.",
    "eval-translate": "Translate the prompts to evaluate on, if the recipe says so.",
    "evaluate": "Let an arm's policy answer the evaluation prompts, and judge them.",
    "euroeval": "Let EuroEval evaluate an arm's policy, if the recipe says so.",
    "arena-prompts": "Read and check the arena's own prompts, if the recipe has them.",
    "arena-sample": "Let an arm's policy answer the arena's prompts, where `evaluate` has not done so already.",
    "arena": "Let a judge compare an arm's completions with the base's.",
    "results": "Aggregate verdicts, with intervals.",
}


@app.command()
def init(
    kind: Annotated[
        str,
        typer.Argument(metavar="[RECIPE]", help="lab, one-gpu, eight-gpus, paper-eurollm or paper-tiny-aya."),
    ] = "lab",
) -> None:
    """Write a commented recipe into the current folder."""
    from croco.cli.init import write

    for line in write(kind, Path()):
        say(line)


@app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The page of docs/reference/recipe.md instead.")
    ] = False,
) -> None:
    """Print the JSON schema of a recipe, for editors."""
    from croco.config import reference

    say(reference.markdown().rstrip() if markdown else json.dumps(reference.schema(), indent=1))


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    rebuild: Rebuild = False,
    until: Annotated[
        str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")
    ] = None,
    limit: Limit = None,
) -> None:
    """Run everything of a recipe that is not complete yet."""
    loaded = load_recipe(recipe, overrides, limit)
    if loaded.study:
        from croco.pipeline import seeds as study

        if until:
            raise UserError(
                f"--until {until}: a study ends with its page; run the recipe of one seed, in its folder"
            )
        study.run(loaded, rebuild=rebuild, say=say)
        from croco.report.study import write

        say(f"study: {write(loaded, say)}")
        return
    from croco.pipeline import run as pipeline

    complete = pipeline.run(loaded, rebuild=rebuild, until=until, say=say)
    if "results" in complete:
        from croco.report import command

        command.show(loaded.folder)
    if "report" in complete:
        say(f"report: {loaded.folder / 'report' / 'report.html'}")


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    limit: Limit = None,
    machine: Annotated[
        str | None, typer.Option(metavar="NxGPU", help="Estimate GPU hours on such as 8xh100.")
    ] = None,
) -> None:
    """Say what would run, what is complete or stale and why, and what it may cost."""
    loaded = load_recipe(recipe, overrides, limit)
    from croco.cli import plan as planning

    for line in planning.describe(loaded, machine=machine):
        say(line)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    other: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Another run, to set beside it on one page.")
    ] = None,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Print the table here and leave the page as it is.")
    ] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown to this file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write every row of the results to this file.")] = None,
    latex: Annotated[Path | None, typer.Option(help="Write the tables as LaTeX to this file.")] = None,
    intervals: Annotated[bool, typer.Option("--intervals", help="With intervals in the LaTeX.")] = False,
    to: Annotated[Path | None, typer.Option(help="The page of two runs; in the first's folder else.")] = None,
) -> None:
    """Make the page of a finished run again, or one of two runs; print or export its tables."""
    from croco.report import command

    if other is not None:
        if terminal or markdown or csv or latex:
            raise UserError(
                "two runs make one page; --terminal is `croco compare`, the exports are of one run"
            )
        say(f"report: {command.beside(folder, other, to)}")
        return
    if to is not None:
        raise UserError("--to is for the page of two runs; that of one run is RUN/report/report.html")
    for written in command.export(folder, markdown, csv, latex, intervals):
        say(f"tables: {written}")
    if terminal:
        command.show(folder)
    else:
        say(command.page(folder, say))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run's folder.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another's.")],
) -> None:
    """Say what differs between two finished runs, in their recipes and in their results."""
    from croco.report import command

    command.show_comparison(first, second)


for _command in (chat, export, fetch, merge, pairs, push):
    app.command()(_command)


@app.command()
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="Check what it needs too.")
    ] = None,
    overrides: Overrides = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Load the models, sample and score a little, and say how long all takes."
        ),
    ] = False,
) -> None:
    """Say what this machine has, and whether a recipe's models and chat template work on it and fit."""
    loaded = load_recipe(recipe, overrides) if recipe is not None else None
    from croco.cli import doctor as examination

    for line in examination.machine():
        say(line)
    if loaded is not None:
        from croco.cli import preflight
        from croco.pipeline import run as pipeline

        pipeline.set_threads(loaded.runtime)
        for line in preflight.examine(loaded, measure):
            say(line)


@euroeval.command()
def install(
    to: Annotated[
        Path | None, typer.Option(help="A new folder; .venv-euroeval here if not given.", show_default=False)
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="A Python of 3.12 or later; looked for if not given.")
    ] = None,
) -> None:
    """Make EuroEval's environment: 7 GB, some minutes, once."""
    from croco.stages.euroeval import install as euroeval_install

    say(f"euroeval: {euroeval_install.install(to, python, say)}")


OWN_COMMANDS: dict[str, Callable[..., None]] = {"train": train, "score": score}
for _name, _text in STAGE_COMMANDS.items():
    _function = OWN_COMMANDS.get(_name) or stage_command(_name)
    if _name == "euroeval":  # beside `croco euroeval install`
        euroeval.command("run", help=_text)(_function)
    else:
        app.command(_name, help=_text, rich_help_panel="Stages")(_function)


def version(show: bool) -> None:
    if show:
        say(f"croco {__version__}")
        raise typer.Exit


@app.callback()
def options(
    show: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Cross-lingual contrastive preference tuning on self-generations."""


def main() -> None:
    app(prog_name="croco")
