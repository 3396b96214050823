"""A stage: a function that turns tables into the next table, and a frozen record that says when it is finished.

The contract: a stage's folder holds shards with markers, a ledger of what was left out, and `stage.json` with the
resolved settings, their fingerprint, what it read, and what it took. A complete stage whose fingerprint matches is
skipped; a mismatch stops and names the fields; an unfinished stage redoes only the shards without a marker. Always
read = written + dropped. Which stages there are is `pipeline.py`.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa

from croco import provenance, store
from croco.errors import StaleStage, UserError
from croco.identity import digest
from croco.progress import Progress, progress
from croco.recipe import Recipe, Runtime
from croco.records import DROPPED, TABLES, Table

Settings = dict[str, Any]
Reference = tuple[str, str | None]  # a stage's name and its arm


def _once(recipe: Recipe) -> list[str | None]:
    return [None]


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline; building one runs nothing and imports nothing."""

    name: str  # its folder and its command
    version: int  # raised when what the function computes changes meaning
    function: str  # "croco.sampling.sample:sample", imported when it runs
    table: str  # a name of records.TABLES, or "" when it writes no table
    settings: Callable[[Recipe, str | None], Settings]  # the resolved values that change the science
    follows: Callable[[Recipe, str | None], list[Reference]]  # the stages it reads
    arms: Callable[[Recipe], list[str | None]] = _once  # one run per arm, or [None] for one shared run
    reads_all: tuple[str, str] | None = None  # (unit, stage): it must account for every row of that input


@dataclass(frozen=True)
class Node:
    """A stage for one arm, or shared (arm None), with the fingerprints of what it reads."""

    stage: Stage
    arm: str | None
    folder: Path
    settings: Settings
    inputs: Mapping[str, Node]

    @property
    def title(self) -> str:
        return self.stage.name if self.arm is None else f"{self.stage.name}/{self.arm}"

    @property
    def science(self) -> dict[str, Any]:
        """What the fingerprint is the digest of."""
        return {
            "name": self.stage.name,
            "version": self.stage.version,
            "arm": self.arm,
            "settings": self.settings,
            "inputs": {name: node.fingerprint for name, node in self.inputs.items()},
        }

    @property
    def fingerprint(self) -> str:
        return digest(self.science)


@dataclass(frozen=True)
class Status:
    """How a node's folder stands: 'missing', 'unfinished', 'complete' or 'stale' with the changes."""

    kind: str
    changes: tuple[str, ...] = ()


@dataclass
class Work:
    """What a stage's function receives: its settings, the folders it reads, and the means to write shards."""

    recipe: Recipe
    arm: str | None
    folder: Path
    settings: Settings
    runtime: Runtime
    seed: int
    inputs: dict[
        str, Path
    ]  # stage name (or "stage/arm" where several arms are read) -> folder of a finished stage
    table: Table | None
    title: str
    record_file: dict[str, Any] = field(default_factory=dict)

    def todo(self, num_shards: int) -> list[int]:
        """Indices of the shards not yet finished, of `num_shards` that follow from the data and the shard size."""
        earlier = self.record_file.get("num_shards")
        if earlier not in (None, num_shards):
            raise RuntimeError(f"{self.title} started with {earlier} shards and now has {num_shards}")
        self.record_file["num_shards"] = num_shards
        store.write_json(self.folder / "stage.json", self.record_file)
        finished = {shard.index for shard in store.shards(self.folder)}
        return [index for index in range(num_shards) if index not in finished]

    def write(
        self,
        index: int,
        table: pa.Table,
        *,
        read: Mapping[str, int] | None = None,
        dropped: pa.Table | None = None,
    ) -> None:
        """One finished shard: ledger, shard, marker.

        `read` maps a unit to how many of them the shard had to account for; each must equal written + dropped of that
        unit. Written is the table's rows, or for the unit "prompt" the distinct (prompt_id, language) in it. Without
        `read` the table's own unit is counted. Raises ValueError on an imbalance or a duplicate key.
        """
        if self.table is None:
            raise ValueError(f"{self.title} writes no table")
        drops = store.count_units(dropped) if dropped is not None else {}
        keys = table.select(list(self.table.key))
        if keys.group_by(keys.column_names).aggregate([]).num_rows != table.num_rows:
            raise ValueError(f"{self.title}, shard {index}: duplicate key {self.table.key}")
        written = {self.table.unit: table.num_rows}
        for unit in read or {}:
            if unit == "prompt" and self.table.unit != "prompt":
                prompts = table.select(["prompt_id", "language"])
                written[unit] = prompts.group_by(prompts.column_names).aggregate([]).num_rows
            else:
                written[unit] = table.num_rows
        read = (
            dict(read)
            if read is not None
            else {self.table.unit: table.num_rows + drops.get(self.table.unit, 0)}
        )
        balance(self.title, read, written, drops)
        store.write_shard(
            self.folder, index, table, self.table.schema, read=read, written=written, dropped=dropped
        )

    def account(
        self, read: Mapping[str, int], written: Mapping[str, int], dropped: pa.Table | None = None
    ) -> None:
        """Counts and ledger of a stage that writes no table (training: pairs read = trained on + dropped)."""
        drops = store.count_units(dropped) if dropped is not None else {}
        balance(self.title, read, written, drops)
        store.write_parquet(
            self.folder / "dropped.parquet",
            dropped if dropped is not None else DROPPED.schema.empty_table(),
            DROPPED.schema,
        )
        self.record_file["counts"] = {"read": dict(read), "written": dict(written), "dropped": drops}

    def scratch(self) -> Path:
        """A folder for checkpoints and the like, removed when the stage is complete."""
        path = self.folder / "scratch"
        path.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def progress(self, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
        """A bar with rate and time left on a terminal, silence elsewhere; `.advance(n)` moves it."""
        with progress(self.title, total, unit, done) as bar:
            yield bar

    def record(self, **facts: Any) -> None:
        """Put facts (device, tokens, losses) into `stage.json`."""
        self.record_file.setdefault("facts", {}).update(facts)


def balance(
    title: str, read: Mapping[str, int], written: Mapping[str, int], dropped: Mapping[str, int]
) -> None:
    """Raise ValueError unless read = written + dropped for every unit that was read."""
    for unit, count in read.items():
        left = written.get(unit, 0) + dropped.get(unit, 0)
        if count != left:
            raise ValueError(
                f"{title}: read {count} {unit}s, but wrote {written.get(unit, 0)} and dropped {dropped.get(unit, 0)}"
            )


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Hold a run's folder against a second process; the system lets go of it however this one ends."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run} is in use by another croco process") from None
        yield


def status(node: Node) -> Status:
    """How a node's folder stands against the recipe; reads `stage.json`, and row counts when it is complete."""
    path = node.folder / "stage.json"
    if not path.exists():
        return Status("missing")
    found = store.read_json(path)
    if found["fingerprint"] != node.fingerprint:
        if found["state"] != "complete" and _nothing_made(node.folder):
            return Status("missing")  # it stopped at bad input, say: there is nothing to lose
        return Status("stale", tuple(changes(found, node)))
    if found["state"] != "complete":
        return Status("unfinished")
    try:
        verify(node, found)
    except UserError as error:
        return Status("stale", (str(error),))
    return Status("complete")


def _nothing_made(folder: Path) -> bool:
    """Whether a stage's folder holds nothing but its `stage.json` (and other stages)."""
    return all(
        path.name == "stage.json" or path.name.startswith(store.TEMPORARY) or (path / "stage.json").exists()
        for path in folder.iterdir()
    )


def changes(found: Mapping[str, Any], node: Node) -> list[str]:
    """Each field that changed since a stage was written, old → new."""
    old, new = _flat(found["science"]), _flat(node.science)
    lines = []
    for key in sorted(old.keys() | new.keys(), key=lambda k: (k.startswith("inputs."), k)):
        if old.get(key) != new.get(key):
            before, after = (provenance.shown(side.get(key, "(not there)")) for side in (old, new))
            what = f"its input {key.removeprefix('inputs.')}" if key.startswith("inputs.") else key
            lines.append(f"{what.removeprefix('settings.')}: {before} → {after}")
    return lines


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested tables; an empty table is a value."""
    if not isinstance(value, Mapping) or not value:
        return {prefix.rstrip("."): value}
    return {k: v for key, below in value.items() for k, v in _flat(below, f"{prefix}{key}.").items()}


def verify(node: Node, found: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Check markers against the rows on disk and sum their counts; raises UserError naming the file that is off."""
    if not node.stage.table:
        there = _files(node.folder)
        for name, size in found.get("files", {}).items():
            if there.get(name) != size:
                raise UserError(
                    f"{node.folder / name} is {there.get(name, 'missing')}, expected {size} bytes"
                )
        return dict(found["counts"])
    finished = store.shards(node.folder)
    indices = [shard.index for shard in finished]
    if indices != list(range(found.get("num_shards") or 0)):
        raise UserError(
            f"{node.folder} holds {len(indices)} finished shards, expected {found.get('num_shards')}"
        )
    totals: dict[str, Counter[str]] = {name: Counter() for name in ("read", "written", "dropped")}
    for shard in finished:
        for path, expected in ((shard.path, shard.rows), (shard.ledger, sum(shard.dropped.values()))):
            rows = store.num_rows(path) if expected or path == shard.path else 0
            if rows != expected:
                raise UserError(f"{path} holds {rows} rows, but its marker says {expected}")
        for name, total in totals.items():
            total.update(getattr(shard, name))
    counts = {name: dict(total) for name, total in totals.items()}
    balance(node.title, counts["read"], counts["written"], counts["dropped"])
    return counts


def _files(folder: Path) -> dict[str, int]:
    """Names and sizes of what a stage made, without its `stage.json` and scratch."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.stat().st_size
        for name, path in sorted(names.items())
        if name != "stage.json" and not name.startswith("scratch/")
    }


def clear(folder: Path) -> None:
    """Remove a stage's folder, `stage.json` first; sub-folders that are other stages (arms) stay."""
    (folder / "stage.json").unlink(missing_ok=True)
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.is_dir():
            path.unlink()
        elif not (path / "stage.json").exists():
            shutil.rmtree(path)


def execute(node: Node, recipe: Recipe) -> dict[str, Any]:
    """Run one node to completion, or finish what an earlier process began; returns its `stage.json`."""
    now = status(node)
    if now.kind == "complete":
        return dict(store.read_json(node.folder / "stage.json"))
    if now.kind == "stale":
        raise StaleStage(f"{node.title} was made otherwise: {'; '.join(now.changes)}")
    found = _start(node, recipe, resume=now.kind == "unfinished")
    runtime = recipe.runtime.model_copy(update={"shard_prompts": found["shard_prompts"]})
    work = Work(
        recipe=recipe,
        arm=node.arm,
        folder=node.folder,
        settings=node.settings,
        runtime=runtime,
        seed=recipe.run.seed,
        inputs={name: before.folder for name, before in node.inputs.items()},
        table=TABLES[node.stage.table] if node.stage.table else None,
        title=node.title,
        record_file=found,
    )
    module, _, name = node.stage.function.partition(":")
    started, earlier = time.monotonic(), found["seconds"]
    try:
        getattr(import_module(module), name)(work)
    finally:
        found["seconds"] = round(earlier + time.monotonic() - started, 3)
        if node.folder.is_dir():
            store.write_json(node.folder / "stage.json", found)
    return _finish(node, found)


def _start(node: Node, recipe: Recipe, resume: bool) -> dict[str, Any]:
    """Write or take up `stage.json` in state "running"; an unfinished stage keeps the shard size it began with."""
    node.folder.mkdir(parents=True, exist_ok=True)
    if resume:
        store.remove_unfinished(node.folder)
        found: dict[str, Any] = store.read_json(node.folder / "stage.json")
        found["starts"] += 1
    else:
        clear(node.folder)  # shards without a stage.json are of unknown origin
        found = {
            "stage": node.stage.name,
            "arm": node.arm,
            "state": "running",
            "fingerprint": node.fingerprint,
            "science": node.science,
            "shard_prompts": recipe.runtime.shard_prompts,
            "num_shards": None,
            "counts": {},
            "seconds": 0.0,
            "starts": 1,
            "facts": {},
        }
    found.update(provenance.here())
    store.write_json(node.folder / "stage.json", found)
    return found


def _finish(node: Node, found: dict[str, Any]) -> dict[str, Any]:
    """Check every count, merge the ledgers, and only then say "complete"."""
    counts = verify(node, found)
    if node.stage.reads_all is not None:
        unit, name = node.stage.reads_all
        there = store.read_json(node.inputs[name].folder / "stage.json")["counts"]["written"][unit]
        if counts["read"].get(unit) != there:
            raise ValueError(f"{node.title} read {counts['read'].get(unit)} {unit}s of {name}'s {there}")
    if node.stage.table:
        rows = store.merge_ledgers(node.folder)
        if rows != sum(counts["dropped"].values()):
            raise ValueError(
                f"{node.title}: the merged ledger has {rows} rows, the shards {counts['dropped']}"
            )
    if (node.folder / "scratch").is_dir():
        shutil.rmtree(node.folder / "scratch")
    found |= {"state": "complete", "counts": counts}
    if not node.stage.table:
        found["files"] = _files(node.folder)
    store.write_json(node.folder / "stage.json", found)
    return found
