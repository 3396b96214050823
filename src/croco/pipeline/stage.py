"""Runs a stage: a function that turns tables into the next table, and a record that says when it is finished.

A stage's folder holds shards with markers, a ledger of what was left out, and `stage.json` with the resolved settings,
their fingerprint, what it read, and what it took. A complete stage whose fingerprint matches is skipped; a mismatch
stops and names the fields; an unfinished stage makes only the shards without a marker. Always read = written + dropped.
"""

import fcntl
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from croco.config.runtime import Runtime
from croco.errors import StaleStage, UserError
from croco.models import open
from croco.pipeline import status
from croco.pipeline.node import Node, Settings, new_record, settings_values
from croco.pipeline.progress import Progress, heartbeat, progress
from croco.pipeline.status import LOCK, WRONG, Status, status_of
from croco.storage import files, provenance, records, seeds, shards
from croco.storage.records import Record
from croco.storage.schemas import DROPPED, TABLES, Table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What a stage's worker gets, in whatever process or machine it runs."""

    arm: str | None
    folder: Path
    settings: Settings
    runtime: Runtime
    inputs: Mapping[str, Path]
    engine_seed: int = 0

    @property
    def adapter(self) -> Path | None:
        """What was tuned, where the stage reads a training: an adapter, or a whole model."""
        return open.tuned_weights(self.inputs["train"]) if "train" in self.inputs else None


@dataclass
class Work:
    """What a stage's function receives: the settings that its fingerprint holds, the folders it reads, and `[runtime]`,
    which changes no result; and the means to write shards."""

    arm: str | None
    folder: Path
    settings: Settings
    runtime: Runtime
    inputs: dict[str, Path]  # folders of finished stages by name, "stage/arm" where several arms are read
    table: Table | None
    title: str
    record_file: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """What its workers get. An engine that draws from one stream has another seed for each stage, arm and start."""
        seed = seeds.digest(
            self.settings.get("seed", 0), "engine", self.title, self.record_file.get("starts", 1)
        )
        return Task(self.arm, self.folder, self.settings, self.runtime, self.inputs, seed)

    def todo(self, num_shards: int) -> list[int]:
        """Indices of the shards not yet finished, of `num_shards` that follow from the data and the shard size."""
        earlier = self.record_file.get("num_shards")
        if earlier not in (None, num_shards):
            raise RuntimeError(f"{self.title} started with {earlier} shards and now has {num_shards}")
        self.record_file["num_shards"] = num_shards
        files.write_json(self.folder / records.RECORD, self.record_file)
        finished = {shard.index for shard in shards.shards(self.folder)}
        return [index for index in range(num_shards) if index not in finished]

    def write(
        self,
        index: int,
        table: pa.Table,
        *,
        read: Mapping[str, int] | None = None,
        written: Mapping[str, int] | None = None,
        dropped: pa.Table | None = None,
    ) -> None:
        """One finished shard: ledger, shard, marker.

        `read` maps a unit to how many of them the shard had to account for, each equal to written + dropped of that
        unit; without it the table's own unit is counted. Written is what `written` says, else the table's rows. Raises
        ValueError on an imbalance or a duplicate key."""
        if self.table is None:
            raise ValueError(f"{self.title} writes no table")
        drops = shards.count_units(dropped) if dropped is not None else {}
        keys = table.select(list(self.table.key))
        if keys.group_by(keys.column_names).aggregate([]).num_rows != table.num_rows:
            raise ValueError(f"{self.title}, shard {index}: duplicate key {self.table.key}")
        if read is None:
            read = {self.table.unit: table.num_rows + drops.get(self.table.unit, 0)}
        counts = dict.fromkeys([self.table.unit, *read], table.num_rows) | dict(written or {})
        status.balance(self.title, read, counts, drops)
        shards.write_shard(
            self.folder, index, table, self.table.schema, read=read, written=counts, dropped=dropped
        )

    def account(
        self, read: Mapping[str, int], written: Mapping[str, int], dropped: pa.Table | None = None
    ) -> None:
        """Counts and ledger of a stage that writes no table (training: pairs read = trained on + dropped)."""
        drops = shards.count_units(dropped) if dropped is not None else {}
        status.balance(self.title, read, written, drops)
        shards.write_parquet(
            self.folder / "dropped.parquet",
            dropped if dropped is not None else DROPPED.schema.empty_table(),
            DROPPED.schema,
        )
        self.record_file["counts"] = {"read": dict(read), "written": dict(written), "dropped": drops}

    def scratch(self) -> Path:
        """A folder for checkpoints and the like, removed when the stage is complete."""
        path = self.folder / "scratch"
        with files.writing(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def progress(self, total: int, unit: str, done: int = 0) -> AbstractContextManager[Progress]:
        """A bar with rate and time left on a terminal, a line now and then elsewhere; `.advance(n)` moves it."""
        return progress(self.title, total, unit, done)

    def record(self, **facts: Any) -> None:
        """Put facts (device, tokens, losses) into `stage.json`."""
        self.record_file.setdefault("facts", {}).update(facts)


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Hold a run's folder against a second process; the system lets go of it however this one ends."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK).open("a")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{provenance.shown(str(run))}: this folder cannot be made or written ({files.reason(error)})"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run} is in use by another croco process") from None
        except OSError as error:  # a file system without locks
            raise UserError(f"{run / LOCK} cannot be locked: {files.reason(error)}") from None
        yield


def execute(node: Node, runtime: Runtime, now: Status | None = None) -> Record:
    """Run one node to completion, or finish what an earlier process began; returns its `stage.json`. `now` is its
    state."""
    now = now or status_of(node)
    if now.kind == "complete":
        return records.read_record(node.folder)
    if now.kind in WRONG:
        raise StaleStage(f"{node.title} was made with other settings: {'; '.join(now.changes)}")
    for before in node.inputs.values():
        try:
            status.mend_ledger(before)
            shards.check_contents(before.folder)
        except UserError as error:
            raise StaleStage(status.stale_message([(before, Status("damaged", (str(error),)))])) from None
    record = _start(node, runtime, resume=now.kind == "unfinished")
    work = Work(
        arm=node.arm,
        folder=node.folder,
        settings=settings_values(node.settings),
        runtime=runtime.model_copy(update={"shard_prompts": record["shard_prompts"]}),
        inputs=input_tables(node),
        table=TABLES[node.stage.table] if node.stage.table else None,
        title=node.title,
        record_file=cast(dict[str, Any], record),
    )
    module, _, name = node.stage.function.partition(":")
    started, earlier = time.monotonic(), record["seconds"]
    try:
        with heartbeat(node.title):
            getattr(import_module(module), name)(work)
    finally:
        record["seconds"] = round(earlier + time.monotonic() - started, 3)
        if node.folder.is_dir():
            records.write_record(node.folder, record)
    return _finish(node, record)


def input_tables(node: Node) -> dict[str, Path]:
    """The folders of the tables that a node reads, by name."""
    folders = {name: before.folder for name, before in node.inputs.items() if not before.stage.gives}
    given = {name: before.folder / name for before in node.inputs.values() for name in before.stage.gives}
    return folders | given


def _start(node: Node, runtime: Runtime, resume: bool) -> Record:
    """Write or take up `stage.json` in state "running"; an unfinished stage keeps the shard size it began with."""
    with files.writing(node.folder):
        node.folder.mkdir(parents=True, exist_ok=True)
    if resume:
        for damage in shards.remove_unfinished(node.folder):
            logger.warning("%s: %s: this shard is made again", node.title, damage)
        record = records.read_record(node.folder)
        record["starts"] += 1
    else:
        status.clear(node)  # an attempt that made nothing, or a removal that was cut short
        record = new_record(node, runtime.shard_prompts)
    record.update(provenance.here())  # type: ignore[typeddict-item]
    records.write_record(node.folder, record)
    return record


def _finish(node: Node, record: Record) -> Record:
    """Check every count, merge the ledgers, and only then say "complete"."""
    counts = status.verify(node, record)
    if node.stage.reads_all and "completions" not in node.settings:  # else it asks for some of them
        unit, name = node.stage.reads_all
        there = records.read_record(node.inputs[name].folder)["counts"]["written"][unit]
        if counts["read"].get(unit) != there:
            raise ValueError(f"{node.title} read {counts['read'].get(unit)} {unit}s of {name}'s {there}")
    if node.stage.table:
        rows = shards.merge_ledgers(node.folder)
        if rows != sum(counts["dropped"].values()):
            raise ValueError(
                f"{node.title}: the merged ledger has {rows} rows, the shards {counts['dropped']}"
            )
    record["state"], record["counts"] = "complete", counts
    if not node.stage.table:
        record["files"] = status.files_made(node)
    record["digests"] = files.file_digests(node.folder, record.get("files", ["dropped.parquet"]))
    records.write_record(node.folder, record)
    remove_scratch(node)
    return record


def remove_scratch(node: Node) -> None:
    """Remove what a complete stage no longer needs: only once its record says that it is complete, or a kill would
    leave it half gone."""
    if (node.folder / "scratch").is_dir():
        files.remove(node.folder / "scratch")
