"""The program itself: what every command shares. It loads nothing that computes.

Bad input is one sentence and exit code 2, Ctrl-C is exit code 130; everything else is a mistake of ours and shows its
traceback.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from croco.errors import UserError, printable

if TYPE_CHECKING:
    from croco.config.recipe import Recipe

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (TOML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any value of the recipe, e.g. sampling.completions=8."),
]
Rebuild = Annotated[
    bool, typer.Option("--rebuild", help="Remove stale stages, and those after them, and remake them.")
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", min=1, metavar="N", help="A trial on the first N prompts of each kind, in FOLDER-limit-N."
    ),
]
ArmName = Annotated[str | None, typer.Option("--arm", metavar="ARM", help="Only this arm.")]


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
euroeval = typer.Typer(
    help="EuroEval's structured tasks: its environment, and the stage.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(euroeval, name="euroeval")


def say(line: str) -> None:
    """A line for the person at the terminal, at once."""
    print(printable(line), flush=True)


class Printable(logging.Formatter):
    """Warnings may repeat what models, files and servers say."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


if logging.lastResort is not None:  # what writes warnings where nobody has set up logging
    logging.lastResort.setFormatter(Printable())


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn what a person can act on into one sentence and an exit code; let our own mistakes through."""
    try:
        yield
    except UserError as error:
        print(printable(f"croco: {error}"), file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # whoever read this has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
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


def load_recipe(path: Path, overrides: list[str] | None, limit: int | None = None) -> Recipe:
    """The recipe; with a limit, that of a trial on the first prompts, in a folder of its own."""
    from croco.config.load import load

    loaded = load(path, overrides or [])
    if limit is None:
        return loaded
    sections = {"prompts": loaded.prompts, "evaluation": loaded.evaluation, "arena": loaded.arena}
    trial = [
        f"{name}.limit={min(limit, section.limit or limit)}" for name, section in sections.items() if section
    ]
    trial.append(f'run.folder="{loaded.folder}-limit-{limit}"')
    return load(path, [*(overrides or []), *trial])


def load_run(folder: Path, arm: str, base: bool = False) -> Recipe:
    """The recipe of a run's folder, which has this arm."""
    if not (folder / "recipe.json").exists():
        raise UserError(f"{folder} holds no recipe.json, expected the folder of a run")
    loaded = load_recipe(folder / "recipe.json", [f'run.folder="{folder}"'])
    if loaded.study:
        raise UserError(f"{folder} is a study, expected one run: those of its seeds lie in folders of it")
    arms = [*loaded.arms, *(["base"] if base else [])]
    if arm not in arms:
        raise UserError(f"--arm {arm}: no such arm, expected one of {', '.join(arms)}")
    return loaded


def run_of(folder: Path, arm: str | None, base: bool = False) -> Recipe | None:
    """The recipe of a run's folder with this arm (or the "base"); None for a folder that is no run."""
    if not folder.is_dir() and folder.suffix != ".gguf":
        raise UserError(f"{folder}: no such folder")
    if (folder / "recipe.json").exists():
        if arm is None:
            raise UserError(f"{folder} is a run: expected --arm with one of its arms")
        return load_run(folder, arm, base)
    if arm is not None:
        raise UserError(f"--arm {arm} is for a run, and {folder} holds no recipe.json")
    return None


def stage_command(name: str) -> Callable[..., None]:
    def command(
        recipe: RecipePath,
        overrides: Overrides = None,
        arm: ArmName = None,
        rebuild: Rebuild = False,
        limit: Limit = None,
    ) -> None:
        loaded = load_recipe(recipe, overrides, limit)
        from croco.pipeline import run

        run.run_stage(loaded, name, arm=arm, rebuild=rebuild, say=say)

    return command
