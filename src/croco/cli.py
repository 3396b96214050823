"""The command line: parse, then import what the command needs. `croco --help` loads no torch and no Polars.

Bad input is one sentence and exit code 2, Ctrl-C is exit code 130; everything else is a mistake of ours and shows its
traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from croco import __version__
from croco.errors import UserError

if TYPE_CHECKING:
    from croco.recipe import Recipe

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (TOML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any value of the recipe, e.g. sampling.completions=8."),
]
Rebuild = Annotated[
    bool, typer.Option("--rebuild", help="Remove stale stages, and those after them, and remake them.")
]
ArmName = Annotated[str | None, typer.Option("--arm", metavar="ARM", help="Only this arm.")]

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
    "arena": "Let a judge compare an arm's completions with the base's, in both orders.",
    "results": "Aggregate verdicts, with intervals.",
}


class Croco(typer.core.TyperGroup):
    """The program: whatever a command raises passes through `one_sentence`."""

    def invoke(self, ctx: Any) -> Any:
        with one_sentence():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Croco,
    name="croco",
    help="Cross-lingual contrastive preference tuning on self-generations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
lab = typer.Typer(
    help="The small world shipped inside the package.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(lab, name="lab")
euroeval = typer.Typer(
    help="EuroEval's structured tasks: its environment, and the stage.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(euroeval, name="euroeval")


def say(line: str) -> None:
    """A line for the person at the terminal, at once."""
    print(line, flush=True)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn what a person can act on into one sentence and an exit code; let our own mistakes through."""
    try:
        yield
    except UserError as error:
        print(f"croco: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("croco: interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        import errno

        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(
            f"croco: {error.filename or 'a file'} cannot be written ({str(error.strerror).lower()}); "
            f"make room and run the same command again",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


def load_recipe(path: Path, overrides: list[str] | None) -> Recipe:
    from croco import recipe

    return recipe.load(path, overrides or [])


def load_run(folder: Path, arm: str) -> Recipe:
    """The recipe of a run's folder, which has this arm."""
    if not (folder / "recipe.json").exists():
        raise UserError(f"{folder} holds no recipe.json, expected the folder of a run")
    loaded = load_recipe(folder / "recipe.json", [f'run.folder="{folder}"'])
    if arm not in loaded.arms:
        raise UserError(f"--arm {arm}: no such arm, expected one of {', '.join(loaded.arms)}")
    return loaded


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    rebuild: Rebuild = False,
    until: Annotated[
        str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")
    ] = None,
) -> None:
    """Run everything of a recipe that is not complete yet."""
    loaded = load_recipe(recipe, overrides)
    if loaded.study:
        from croco.study import run as study

        if until:
            raise UserError(
                f"--until {until}: a study ends with its page; run the recipe of one seed, in its folder"
            )
        say(f"study: {study.run(loaded, rebuild=rebuild, say=say)}")
        return
    from croco import pipeline

    pipeline.run(loaded, rebuild=rebuild, until=until, say=say)
    show_end(loaded.folder)


def show_end(folder: Path) -> None:
    """The last table and the path of the page, when the run has come so far."""
    if (folder / "results" / "dropped.parquet").exists():
        from croco.report import command

        command.show(folder)
    page = folder / "report" / "report.html"
    if page.exists():
        say(f"report: {page}")


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Say what would run, what is complete or stale and why, and what it may cost."""
    loaded = load_recipe(recipe, overrides)
    from croco import planning

    for line in planning.describe(loaded):
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
    if terminal:
        command.show(folder)
    else:
        say(command.page(folder, say))
    for written in command.export(folder, markdown, csv, latex, intervals):
        say(f"tables: {written}")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run's folder.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another's.")],
) -> None:
    """Say what differs between two finished runs, in their recipes and in their results."""
    from croco.report import command

    command.show_comparison(first, second)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    arm: Annotated[str, typer.Option(help="The arm whose pairs to export.")],
    to: Annotated[Path, typer.Option(help="A new folder.")],
    form: Annotated[
        str, typer.Option("--format", help="preference or prompt-completion (SFT).")
    ] = "preference",
    license: Annotated[str, typer.Option(help="The licence field of the dataset card.")] = "unknown",
) -> None:
    """Write an arm's pairs in TRL's format, with a dataset card."""
    loaded = load_run(folder, arm)
    from croco.pairing.command import facts_of
    from croco.pairing.exporting import export_pairs

    rows = export_pairs(
        folder / "pair" / arm,
        to,
        form,
        instructions=loaded.policy.instruction,
        license=license,
        facts=facts_of(loaded, arm),
    )
    say(f"{rows:,} rows in {to}")


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    arm: Annotated[str, typer.Option(help="The arm whose policy to write.")],
    to: Annotated[Path, typer.Option(help="A new folder.")],
    license: Annotated[str, typer.Option(help="The licence field of the model card.")] = "unknown",
) -> None:
    """Merge an arm's adapter into its base: a model folder with a card, proven to be base + adapter."""
    loaded = load_run(folder, arm)
    from croco import pipeline
    from croco.training.merge import merge as write

    pipeline.set_threads(loaded)
    write(loaded, arm, to, license, say)


@app.command()
def pairs(
    sources: Annotated[list[Path], typer.Argument(metavar="FILE...", help="JSON lines or Parquet.")],
    to: Annotated[Path, typer.Option(help="A new folder, for the pairs and what they were made from.")],
    column: Annotated[
        list[str] | None, typer.Option(metavar="OURS=THEIRS", help="Map a column, e.g. prompt_id=id.")
    ] = None,
    language: Annotated[str | None, typer.Option(help="Of all rows, where no column says it.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A value of an arm, e.g. pool=all.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="preference or prompt-completion (SFT).")
    ] = "preference",
    license: Annotated[str, typer.Option(help="The licence field of the dataset card.")] = "unknown",
) -> None:
    """Make pairs from scored completions of another tool, and export them."""
    from croco.pairing.command import pairs_of_files

    rows = pairs_of_files(sources, to, column or [], language, overrides or [], form, license)
    say(f"{rows:,} rows in {to / 'export'}")


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
    from croco import doctor as examination

    for line in examination.machine():
        say(line)
    if loaded is not None:
        from croco import checkup, pipeline

        pipeline.set_threads(loaded)
        for line in checkup.examine(loaded, measure):
            say(line)


@lab.command()
def build(
    folder: Annotated[Path | None, typer.Option(help="Where to; the package itself if not given.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of everything; that of the shipped models if not given.")
    ] = None,
    rivals: Annotated[
        bool, typer.Option("--rivals", help="Only the other policy and the translator of the rival methods.")
    ] = False,
) -> None:
    """Make the lab's models again from nothing."""
    from croco.lab import build as building

    make = building.build_rivals if rivals else building.build
    make(folder, building.SEED if seed is None else seed)


@lab.command()
def gates(
    folder: Annotated[
        Path | None, typer.Option(help="A folder that `lab build` wrote; the shipped one if not given.")
    ] = None,
) -> None:
    """Measure on dev prompts what the reward model picks, beside random and likelihood."""
    from rich.console import Console

    from croco.lab import build as building
    from croco.lab.gates import measure

    found = folder or building.MODELS
    Console().print(measure(found / "policy", found / "reward", building.SEED)[0])


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
    from croco.evaluation import euroeval_install

    say(f"euroeval: {euroeval_install.install(to, python, say)}")


def stage_command(name: str) -> Callable[..., None]:
    def command(
        recipe: RecipePath, overrides: Overrides = None, arm: ArmName = None, rebuild: Rebuild = False
    ) -> None:
        loaded = load_recipe(recipe, overrides)
        from croco import pipeline

        pipeline.run_stage(loaded, name, arm=arm, rebuild=rebuild, say=say)

    return command


def score(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECIPE | FILE...", help="A recipe; with --diagnose preference pairs.", show_default=False
        ),
    ],
    overrides: Overrides = None,
    arm: ArmName = None,
    rebuild: Rebuild = False,
    diagnose: Annotated[
        bool, typer.Option("--diagnose", help="Measure how reward models rank the pairs of files.")
    ] = False,
    reward: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="With --diagnose: a reward model; may repeat.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="With --diagnose: a new folder.", show_default=False)
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="With --diagnose: of all rows, where no column says it.")
    ] = None,
) -> None:
    if not diagnose:
        if len(paths) != 1 or reward or to or language:
            raise UserError(
                "croco score takes one recipe; FILE..., --reward, --to and --language go with --diagnose"
            )
        stage_command("score")(paths[0], overrides, arm, rebuild)
        return
    if arm or rebuild:
        raise UserError("croco score --diagnose reads files of pairs: --arm and --rebuild go with a recipe")
    if to is None:
        raise UserError("croco score --diagnose: expected --to FOLDER")
    from croco.evaluation import ranking

    ranking.diagnose(paths, reward or [], to, language, overrides or [])
    say((to / "ranking.md").read_text(encoding="utf-8"))


def train(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECIPE|FILE...", help="A recipe, or preference pairs (JSON lines or Parquet)."
        ),
    ],
    overrides: Overrides = None,
    arm: ArmName = None,
    rebuild: Rebuild = False,
    model: Annotated[str | None, typer.Option(help="With pairs: the policy to tune.")] = None,
    to: Annotated[Path | None, typer.Option(help="With pairs: a new folder.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="OURS=THEIRS", help="With pairs: map a column, e.g. prompt_id=id."),
    ] = None,
    language: Annotated[str | None, typer.Option(help="With pairs: where no column says it.")] = None,
    license: Annotated[str, typer.Option(help="With pairs: the licence field of the card.")] = "unknown",
) -> None:
    """Tune an arm of a recipe, or (with --model and --to) a model on any preference pairs."""
    if len(sources) == 1 and (sources[0].suffix == ".toml" or sources[0].name == "recipe.json"):
        given = {"--model": model, "--to": to, "--column": column, "--language": language}
        if wrong := [name for name, value in given.items() if value]:
            raise UserError(f"{', '.join(wrong)}: for files of pairs, and {sources[0]} is a recipe")
        stage_command("train")(sources[0], overrides, arm, rebuild)
        return
    if arm is not None or rebuild:
        raise UserError("--arm and --rebuild are for a recipe (.toml), and these are files of pairs")
    if model is None or to is None:
        raise UserError(f"{sources[0]} is no recipe (.toml): pairs need --model MODEL and --to FOLDER")
    from croco.training.command import train_on_files

    train_on_files(sources, model, to, column or [], language, overrides or [], license, say)


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
    """The `croco` program."""
    app(prog_name="croco")
