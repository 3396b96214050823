"""`croco run` of a recipe with `[study]`: one ordinary run per seed in RUN/seed-N, some at once.

Seeds that run at once are processes of their own, which end with this one."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from croco.config.arms import Origin
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.models.children import before_exec
from croco.pipeline import run as pipeline
from croco.pipeline import status
from croco.pipeline.graph import nodes
from croco.pipeline.stage import lock
from croco.storage import records

Say = Callable[[str], None]
# compared with each other in the transfer
SCORERS = ("reward", "likelihood", "likelihood-sum", "random", "verified")


def of_seed(recipe: Recipe, seed: int) -> Recipe:
    run = recipe.run.model_copy(update={"seed": seed, "folder": str(recipe.folder / f"seed-{seed}")})
    return recipe.model_copy(update={"run": run, "study": None})


def transfer_of(recipe: Recipe, seed: int) -> Recipe:
    """A recipe that only samples and scores, in every evaluated language, for the reward model's transfer."""
    assert recipe.study is not None
    assert recipe.study.transfer is not None
    wanted, some = recipe.study.transfer, next(iter(recipe.arms.values()))
    run = recipe.run.model_copy(update={
        "seed": seed, "folder": str(recipe.folder / f"transfer-{seed}"), "languages": recipe.run.evaluated,
        "low_resource_languages": (), "held_out_languages": (),
    })  # fmt: skip
    arm = some.model_copy(update={**dict(Origin()), "pool": "language", "chosen": "max", "rejected": "min"})
    return recipe.model_copy(update={
        "run": run, "study": None, "sweep": {},
        "prompts": recipe.prompts.model_copy(update={"split": wanted.split, "limit": wanted.limit}),
        "sampling": recipe.sampling.model_copy(update={"completions": wanted.completions}),
        "arms": {name: arm.model_copy(update={"scorer": name}) for name in SCORERS},
    })  # fmt: skip


def parts(recipe: Recipe) -> list[tuple[Recipe, str | None]]:
    """The ordinary recipes that a study consists of, each with the stage it ends at."""
    assert recipe.study is not None
    every: list[tuple[Recipe, str | None]] = [(of_seed(recipe, seed), None) for seed in recipe.study.seeds]
    if recipe.study.transfer:
        every += [(transfer_of(recipe, seed), "score") for seed in recipe.study.seeds]
    return every


def run(recipe: Recipe, *, rebuild: bool = False, say: Say = lambda line: None) -> None:
    """Run what is not complete of every seed; the page over all of them is `report/study.py`."""
    todo = parts(recipe)
    for part, until in todo:  # what is missing or stale is said before anything runs
        planned = dict(pipeline.plan(part, until))
        if not rebuild:
            status.stop_if_wrong(planned)
    with lock(recipe.folder):
        pipeline.keep_recipe(recipe)
        if recipe.runtime.seeds_at_once > 1:
            _side_by_side(todo, recipe.runtime.seeds_at_once, rebuild, say)
        else:
            for part, until in todo:
                say(f"seed {part.run.seed} in {part.folder}")
                pipeline.run(part, rebuild=rebuild, until=until, say=say)


def _side_by_side(todo: Sequence[tuple[Recipe, str | None]], at_once: int, rebuild: bool, say: Say) -> None:
    """Every part in a process of its own, some at once; the first that fails ends the others."""
    waiting, running = list(todo), dict[subprocess.Popen[bytes], Recipe]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                part, until = waiting.pop(0)
                running[_start(part, until, rebuild)] = part
                say(f"seed {part.run.seed} in {part.folder}, its lines in log.txt there")
            for process in [one for one in running if one.poll() is not None]:
                part = running.pop(process)
                if process.returncode != 0:
                    lines = (
                        (part.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
                    )
                    last = lines[-1].removeprefix("croco: ") if lines else f"exit status {process.returncode}"
                    raise UserError(f"{part.folder}: {last}")
                say(f"seed {part.run.seed} in {part.folder}: complete")
            time.sleep(0.2)
    finally:
        for process in running:
            process.terminate()
            process.wait()


def _start(part: Recipe, until: str | None, rebuild: bool) -> subprocess.Popen[bytes]:
    pipeline.keep_recipe(part)
    command = [sys.executable, "-m", "croco", "run", str(part.folder / "recipe.json")]
    command += ["--until", until] if until else []
    command += ["--rebuild"] if rebuild else []
    with (part.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, preexec_fn=before_exec()
        )


def complete(recipe: Recipe) -> dict[str, str]:
    """The fingerprints of what the page is made of; raises UserError naming a part that is not there."""
    fingerprints = {}
    for part, until in parts(recipe):
        for node in nodes(part):
            wanted = ("results", "pair", "train") if until is None else ("score",)
            if node.stage.name in wanted:
                if (state := records.state(node.folder)) != "complete":
                    raise UserError(f"{node.folder} is {state}: run `croco run` first")
                fingerprints[f"{part.folder.name}/{node.title}"] = records.read_record(node.folder)[
                    "fingerprint"
                ]
    return fingerprints
