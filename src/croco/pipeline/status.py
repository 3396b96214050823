"""Compares a stage's folder with the recipe: missing, unfinished, complete, stale with what changed, or damaged.

Reads `stage.json`, the markers and row counts in Parquet metadata, never a table."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from croco.errors import StaleStage, UserError
from croco.pipeline.node import Node, new_record
from croco.storage import files, provenance, records, shards
from croco.storage.hashing import digest
from croco.storage.records import Record

WRONG = ("stale", "damaged")
LOCK = ".lock"  # of a run's folder, or of one that a command on files fills


@dataclass(frozen=True)
class Status:
    """The state of a node's folder: 'missing', 'unfinished', 'complete', or with what is wrong 'stale' or 'damaged'."""

    kind: str
    changes: tuple[str, ...] = ()


def status_of(node: Node, contents: bool = False) -> Status:
    """The state of a node's folder; with `contents` the bytes of what it made are read too. Raises UserError when the
    folder was not made by croco."""
    if not os.path.lexists(node.folder / records.RECORD):
        _check_empty(node)
        return Status("missing")
    try:
        record = records.read_record(node.folder)
    except UserError as error:
        return Status("damaged", (str(error),))
    if record["state"] == "removed":
        return Status("missing")
    if record["fingerprint"] != digest(record["science"]):
        return Status(
            "damaged", (f"{node.folder / records.RECORD}: its fingerprint is not that of its settings",)
        )
    if record["fingerprint"] != node.fingerprint:
        if record["state"] != "complete" and _nothing_made(node.folder):
            return Status("missing")  # it stopped at bad input, say: there is nothing to lose
        return Status("stale", tuple(changes(record, node)))
    if record["state"] != "complete":
        return Status("unfinished")
    try:
        verify(node, record)
        if contents:
            shards.check_contents(node.folder)
    except UserError as error:
        return Status("damaged", (str(error),))
    return Status("complete")


def _check_empty(node: Node) -> None:
    """Raise UserError when a stage would fill a folder that holds what croco has not made."""
    if os.path.lexists(node.folder) and not node.folder.is_dir():
        raise UserError(f"{node.folder} is a file, expected the folder of the stage {node.title}")
    for path in node.folder.iterdir() if node.folder.is_dir() else ():
        inside = path.is_dir() and ((path / records.RECORD).exists() or not any(path.iterdir()))
        if not inside and not path.name.startswith("."):
            raise UserError(
                f"{node.folder} holds '{path.name}' and no {records.RECORD}: croco has not made it, expected a new or "
                f"empty folder for {node.title}"
            )


def _nothing_made(folder: Path) -> bool:
    """Whether a stage's folder holds nothing but its `stage.json` (and the lock, and other stages)."""
    return all(
        path.name in (records.RECORD, LOCK)
        or path.name.startswith(files.TEMPORARY)
        or (path / records.RECORD).exists()
        or (path.name == "scratch" and not any(path.iterdir()))
        for path in folder.iterdir()
    )


def changes(record: Record, node: Node) -> list[str]:
    """Each field that changed since a stage was written, old → new."""
    science = node.science
    # settings that its croco did not know yet are not what changed
    unknown = {name for name in node.stage.added if name not in record["science"]["settings"]}
    settings = {name: value for name, value in science["settings"].items() if name not in unknown}
    old, new = flat(record["science"]), flat({**science, "settings": settings})
    lines = []
    tables = {key.rpartition(".")[0] for key in old.keys() | new.keys()}
    for key in sorted(old.keys() | new.keys(), key=lambda k: (k.startswith("inputs."), k)):
        emptied = key in tables and not (old.get(key) or new.get(key))  # or filled: its keys are named
        if old.get(key) != new.get(key) and not emptied:
            before, after = (provenance.shown(side.get(key, "(not there)")) for side in (old, new))
            what = f"its input {key.removeprefix('inputs.')}" if key.startswith("inputs.") else key
            other = "other content, " if before.startswith("sha256:") and after.startswith("sha256:") else ""
            lines.append(f"{what.removeprefix('settings.')}: {other}{before} → {after}")
    return lines


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested tables; an empty table is a value."""
    if not isinstance(value, Mapping) or not value:
        return {prefix.rstrip("."): value}
    return {k: v for key, below in value.items() for k, v in flat(below, f"{prefix}{key}.").items()}


def verify(node: Node, record: Record) -> dict[str, dict[str, int]]:
    """Check markers against the rows on disk and sum their counts; raises UserError naming the file that is off."""
    if not node.stage.table:
        there = files_made(node)
        for name, size in record.get("files", {}).items():
            if there.get(name) != size:
                raise UserError(
                    f"{node.folder / name} is {there.get(name, 'missing')}, expected {size} bytes"
                )
        return dict(record["counts"])
    finished = shards.shards(node.folder)
    indices = [shard.index for shard in finished]
    if indices != list(range(len(indices))) or len(indices) != record.get("num_shards"):
        raise UserError(
            f"{node.folder} holds {len(indices)} finished shards, expected {record.get('num_shards')}"
        )
    totals: dict[str, Counter[str]] = {name: Counter() for name in ("read", "written", "dropped")}
    for shard in finished:
        shards.check_shard(shard)
        for name, total in totals.items():
            total.update(getattr(shard, name))
    counts = {name: dict(total) for name, total in totals.items()}
    if record["state"] == "complete" and counts != record["counts"]:
        raise UserError(f"{node.folder / records.RECORD} counts {record['counts']}, its markers {counts}")
    balance(node.title, counts["read"], counts["written"], counts["dropped"])
    return counts


def mend_ledger(node: Node) -> bool:
    """Write the merged ledger of a complete stage again, from those of its shards, when it is gone or damaged."""
    if not node.stage.table:
        return False
    record, name = records.read_record(node.folder), "dropped.parquet"
    content = record.get("digests", {}).get(name)
    try:
        if content is not None:
            files.check_digest(node.folder / name, content)
            return False
        if shards.num_rows(node.folder / name) == sum(record["counts"].get("dropped", {}).values()):
            return False
    except UserError:
        pass
    shards.merge_ledgers(node.folder)
    record["digests"] = files.file_digests(node.folder, [name])
    records.write_record(node.folder, record)
    return True


def files_made(node: Node) -> dict[str, int]:
    """Names and sizes of what a stage without a table made."""
    tops = [node.folder / name for name in (*node.stage.makes, "dropped.parquet")]
    paths = [path for top in tops for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()]
    return {path.relative_to(node.folder).as_posix(): path.stat().st_size for path in sorted(paths)}


def clear(node: Node) -> None:
    """Remove what a stage made; its record says so first and goes last. Sub-folders that are other stages, files that
    no stage makes, and a folder without a record stay."""
    for path in node.folder.glob(f"{files.TEMPORARY}*-{records.RECORD}"):  # a kill before there was a record
        files.remove(path)
    if not os.path.lexists(node.folder / records.RECORD):
        return
    records.write_record(node.folder, new_record(node, state="removed"))
    for path in node.folder.iterdir():
        if files.OURS.fullmatch(path.name) or path.name in node.stage.makes:
            files.remove(path)
    (node.folder / records.RECORD).unlink()


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


def stop_if_wrong(known: Mapping[Node, Status]) -> None:
    """Raise StaleStage when a stage is stale or damaged, with what is wrong."""
    wrong = [(node, now) for node, now in known.items() if now.kind in WRONG]
    if wrong:
        raise StaleStage(stale_message(wrong))


def clear_wrong(
    known: Mapping[Node, Status], every: Sequence[Node], say: Callable[[str], None]
) -> dict[Node, Status]:
    """Remove stale and damaged stages, and those of `every` after them; returns the states that follow."""
    gone: list[Node] = []
    for node in every:
        wrong = node in known and known[node].kind in WRONG
        if wrong or any(before in gone for before in node.inputs.values()):
            gone.append(node)
    # the last first: a kill in between must not leave a stage that has read one that is gone
    for node in reversed(gone):
        if os.path.lexists(node.folder / records.RECORD):
            clear(node)
            say(f"{node.title:<24} removed, to be made again")
    return {**known, **{node: Status("missing") for node in gone}}


def stale_message(wrong: Sequence[tuple[Node, Status]]) -> str:
    """What changed since the first of these stages was made, or what is damaged, and which others follow from it."""
    node, now = wrong[0]
    if now.kind == "damaged":
        return f"{now.changes[0]}: run again with --rebuild to remove {node.title} and remake it"
    lines = [f"{node.title} in {node.folder} was made with other settings:"]
    lines += [f"  {change}" for change in now.changes]
    if len(wrong) > 1:
        lines.append(f"  and with it {', '.join(other.title for other, _ in wrong[1:])}")
    lines.append("run again with --rebuild to remove and remake them, or name another folder")
    return "\n".join(lines)
