"""Run a recipe, or one stage of it; plan it; keep its recipe. A node's status is read once a command."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import polars as pl

from croco.config.recipe import Recipe
from croco.config.runtime import Runtime
from croco.errors import UserError
from croco.models import open
from croco.pipeline import status
from croco.pipeline.graph import known_stage, nodes
from croco.pipeline.node import Node, new_record
from croco.pipeline.progress import count_of
from croco.pipeline.stage import execute, lock, remove_scratch
from croco.pipeline.status import Status, status_of
from croco.storage import files, records, shards
from croco.storage.hashing import canonical
from croco.storage.records import Record
from croco.storage.schemas import TABLES

Say = Callable[[str], None]
# of a recipe.json that croco has written
SECTIONS = {"run", "prompts", "policy", "reward", "sampling", "evaluation", "arms", "runtime", "study"}


def _until(every: list[Node], until: str | None) -> list[Node]:
    return every if until is None else every[: every.index(_of_stage(every, until)[-1]) + 1]


def plan(recipe: Recipe, until: str | None = None) -> list[tuple[Node, Status]]:
    """The state of each stage: complete, unfinished, missing, stale with what changed, or damaged."""
    return [(node, status_of(node)) for node in _until(nodes(recipe), until)]


def run(
    recipe: Recipe, *, rebuild: bool = False, until: str | None = None, say: Say = lambda line: None
) -> list[str]:
    """Run what is not complete, in order; returns the names of the stages that are complete now. Raises StaleStage
    naming what changed, unless `rebuild` removes it."""
    open.check(recipe)
    every = nodes(recipe)
    todo = _until(every, until)
    _run_nodes(recipe, todo, todo, every, rebuild, say)
    return list(dict.fromkeys(node.stage.name for node in todo))


def run_stage(
    recipe: Recipe, name: str, *, arm: str | None = None, rebuild: bool = False, say: Say = lambda line: None
) -> None:
    """Run one stage (of one arm, if named); what it reads must be complete."""
    if recipe.study:
        raise UserError(
            f"{name}: the recipe is a study, expected that of one run, such as {recipe.folder}/seed-0/recipe.json"
        )
    if arm is not None and arm not in ("base", *recipe.arms):
        raise UserError(f"--arm {arm}: no such arm, expected one of base, {', '.join(recipe.arms)}")
    open.check(recipe)
    every = nodes(recipe)
    todo = _of_stage(every, name)
    if arm is not None:
        inputs = [before for node in every if node.arm == arm for before in node.inputs.values()]
        own = [node for node in todo if node.arm == arm] or [node for node in todo if node in inputs]
        todo = own or [node for node in todo if node.arm is None]
        if not todo:
            raise UserError(f"--arm {arm}: {name} has no such arm")
    _run_nodes(recipe, todo, every, every, rebuild, say)


def _run_nodes(
    recipe: Recipe,
    todo: Sequence[Node],
    removable: Sequence[Node],
    every: Sequence[Node],
    rebuild: bool,
    say: Say,
) -> None:
    """Hold the run's folder, check all that can be checked before it costs anything, and run the nodes of `todo`. With
    `rebuild`, what reads a removed stage and is `removable` goes with it."""
    set_threads(recipe.runtime)
    with lock(recipe.folder):
        readers = {before: node for node in todo for before in node.inputs.values() if before not in todo}
        for before, reader in readers.items():
            _require(before, reader)
        known = {node: status_of(node, contents=rebuild) for node in todo}
        if not rebuild:
            status.stop_if_wrong(known)
        for check in dict.fromkeys(node.stage.check for node, now in known.items() if now.kind != "complete"):
            if check:
                module, _, name = check.partition(":")
                getattr(import_module(module), name)(recipe, say)
        if rebuild:
            known = status.clear_wrong(known, removable, say)
        keep_recipe(recipe, every, say, known)
        for node in todo:
            run_node(node, recipe.runtime, say, known[node])


def _require(before: Node, reader: Node) -> None:
    """Raise UserError unless what a node reads is complete."""
    now = status_of(before)
    if now.kind == "damaged":
        raise UserError(status.stale_message([(before, now)]))
    if now.kind != "complete":
        raise UserError(
            f"{reader.title} reads {before.title}, which is {now.kind}: run `croco {before.stage.name}` or `croco run` "
            f"first"
        )


def _of_stage(every: Sequence[Node], name: str) -> list[Node]:
    """The nodes of one stage; raises UserError when there is no such stage or the recipe has no use for it."""
    of_stage = [node for node in every if node.stage.name == known_stage(name).name]
    if not of_stage:
        raise UserError(
            f"{name}: nothing to do, the recipe does not ask for it (see [translate], [arena] and [euroeval])"
        )
    return of_stage


def run_node(node: Node, runtime: Runtime, say: Say, now: Status | None = None) -> None:
    """Run one node, saying in one line what became of it."""
    now = now or status_of(node)
    if now.kind == "complete":
        remove_scratch(node)  # of a run that was killed while it went
        mended = ", its ledger is written again" if status.mend_ledger(node) else ""
        say(f"{node.title:<24} complete, skipped{mended}")
        return
    if now.kind == "unfinished":
        say(f"{node.title:<24} unfinished, going on")
    record = execute(node, runtime, now)
    open.release()
    say(f"{node.title:<24} {counted(node, record)}{record['seconds']:.1f} s")
    if any(unit != "flag" for unit in record["counts"].get("dropped", {})):
        ledger = shards.read_dropped(node.folder, ["unit", "reason"]).filter(pl.col("unit") != "flag")
        for _, reason, count in shards.reasons(ledger)[:3]:
            say(f"  dropped: {count:,} × {reason}")


def counted(node: Node, record: Record) -> str:
    """What a finished stage wrote and left out, for a line on the terminal."""
    counts = record["counts"]
    own = TABLES[node.stage.table].unit if node.stage.table else None
    written = [(count, unit) for unit, count in counts.get("written", {}).items() if own in (None, unit)]
    parts = [count_of(count, unit) for count, unit in written]
    for unit, count in counts.get("dropped", {}).items():  # a flag marks, it drops nothing
        parts.append(count_of(count, unit) + (" dropped" if unit != "flag" else ""))
    return "".join(f"{part}, " for part in parts)


@contextmanager
def running_in(
    folder: Path, runtime: Runtime, rebuild: bool = False, say: Say = lambda line: None
) -> Iterator[Callable[[Node], Record]]:
    """Hold a folder that a command on files fills; yields what runs a node in it and returns its record. Raises
    StaleStage for what other files or settings have made there, unless `rebuild` makes it anew."""

    def make(node: Node) -> Record:
        known = {node: status_of(node, contents=True)}
        known = status.clear_wrong(known, [node], say) if rebuild else known
        status.stop_if_wrong(known)
        run_node(node, runtime, say, known[node])
        return records.read_record(node.folder)

    set_threads(runtime)
    with lock(folder):
        yield make


def rebuild_report(recipe: Recipe, say: Say = lambda line: None) -> Path:
    """Make the page of a finished run again, whether or not it is there; returns its path."""
    node = nodes(recipe)[-1]
    with lock(recipe.folder):
        for before in node.inputs.values():
            _require(before, node)
        if status_of(node).kind != "missing":  # the old page stays until the new one is there
            records.write_record(node.folder, new_record(node, recipe.runtime.shard_prompts))
        record = execute(node, recipe.runtime)
    say(f"{node.title:<24} {record['seconds']:.1f} s")
    return node.folder / "report.html"


def keep_recipe(
    recipe: Recipe,
    every: Sequence[Node] = (),
    say: Say = lambda line: None,
    known: Mapping[Node, Status] = {},
) -> None:
    """Write the resolved recipe into the run's folder, where `croco report` reads it. One that is there stays where
    another setting made a stage that is there too. Raises UserError for a recipe.json that croco has not written."""
    path, resolved = recipe.folder / "recipe.json", recipe.model_dump(mode="json")
    if os.path.lexists(path):
        there = files.read_json(path)
        if there == resolved:
            return
        if not isinstance(there, dict) or not there.keys() >= SECTIONS:
            raise UserError(
                f"{path} is no resolved recipe: croco has not written it, expected another run.folder, or no such file"
            )
        for node in every[:-1]:  # the page describes itself
            now = known[node] if node in known else status_of(node)
            if now.kind == "stale" and _made_otherwise(node):
                say(f"recipe.json stays as it is, for {node.title} was made with other settings")
                return
    files.write_json(path, resolved)


def _made_otherwise(node: Node) -> bool:
    """Whether a stage has other settings, or has read a table that is gone; that it is to read more tables (of an arm
    that was added) is no contradiction."""
    made = records.read_record(node.folder)["science"]
    if canonical(made["settings"]) != canonical(node.science["settings"]):
        return True
    for name, before in node.inputs.items():
        read = made["inputs"].get(name, before.fingerprint)
        if read != before.fingerprint and (
            records.state(before.folder) == "missing"
            or records.read_record(before.folder)["fingerprint"] != read
        ):
            return True
    return False


def set_threads(runtime: Runtime) -> None:
    """Apply `runtime.threads`: by the environment before torch is loaded, by its own call after."""
    if runtime.threads is None:
        return
    os.environ["OMP_NUM_THREADS"] = str(runtime.threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(runtime.threads)
