"""How a stage's folder stands against the recipe: complete, unfinished, missing, or stale with what changed.

Reads `stage.json`, the markers and row counts in Parquet metadata, never a table; running a stage is `stage.py`.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from croco import provenance, store
from croco.errors import StaleStage, UserError

if TYPE_CHECKING:
    from croco.stage import Node


@dataclass(frozen=True)
class Status:
    """How a node's folder stands: 'missing', 'unfinished', 'complete' or 'stale' with the changes."""

    kind: str
    changes: tuple[str, ...] = ()


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
        there = files(node.folder)
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


def files(folder: Path) -> dict[str, int]:
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


def stop_or_clear(
    todo: list[Node], rebuild: bool, say: Callable[[str], None], every: list[Node] | None = None
) -> None:
    """Stop at stale stages with what changed; with `rebuild`, remove them and those after them."""
    stale = {id(node): now for node in todo if (now := status(node)).kind == "stale"}
    if stale and not rebuild:
        raise StaleStage(stale_message([(node, stale[id(node)]) for node in todo if id(node) in stale]))
    gone: dict[int, Node] = {}
    for node in every or todo:
        if id(node) in stale or any(id(before) in gone for before in node.inputs.values()):
            gone[id(node)] = node
    # the last first: a kill in between must not leave a stage that stands on one that is gone
    for node in reversed(gone.values()):
        if (node.folder / "stage.json").exists():
            clear(node.folder)
            say(f"{node.title:<24} removed, to be made again")


def stale_message(stale: Sequence[tuple[Node, Status]]) -> str:
    """What changed since the first stale stage was made, and which others follow from it."""
    node, now = stale[0]
    lines = [f"{node.title} in {node.folder} was made with other settings:"]
    lines += [f"  {change}" for change in now.changes]
    if len(stale) > 1:
        lines.append(f"  and with it {', '.join(other.title for other, _ in stale[1:])}")
    lines.append("run again with --rebuild to remove and remake them, or give the run another name")
    return "\n".join(lines)
