"""Stage folders with anything in them that a disk, a person or an editor may do: never a traceback, never taken for
whole."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from croco.config.load import load
from croco.config.runtime import Runtime
from croco.errors import UserError
from croco.pipeline import stage, status
from croco.pipeline.graph import nodes
from croco.pipeline.node import Node
from croco.storage import records, shards
from croco.storage.files import file_digests

RUN = Path(__file__).parent / "data" / "old-house.tar.xz"
TITLES = ("sample", "pair/mono", "train/mono")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["\ud800", 10**12, 10**40, -1, "running", "complete", "removed"]),
    lambda below: st.lists(below, max_size=2) | st.dictionaries(st.text(max_size=3), below, max_size=2),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose records have digests, as they are written today."""
    folder = tmp_path_factory.mktemp("whole")
    with tarfile.open(RUN) as archive:
        archive.extractall(folder, filter="data")
    run = folder / "old-house"
    for title in TITLES:
        record = records.read_record(run / title)
        names = record.get("files", ["dropped.parquet"])
        record["digests"] = file_digests(run / title, names)
        records.write_record(run / title, record)
        for marker in (run / title).glob("*.done"):
            counts = json.loads(marker.read_text())
            made = [path.name for path in (run / title).glob(f"{marker.stem}.*parquet")]
            marker.write_text(json.dumps({**counts, "digests": file_digests(run / title, made)}))
    return run


@pytest.fixture(scope="module")
def made(whole: Path) -> list[Node]:
    return nodes(load(whole / "recipe.json", [f'run.folder="{whole}"']))


def mutate(data: st.DataObject, value: Any) -> Any:
    """A JSON value with another one, or nothing, in some place of it."""
    if isinstance(value, dict) and value and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(value)))
        if data.draw(st.integers(0, 4)) == 0:
            return {name: below for name, below in value.items() if name != key}
        return {**value, key: mutate(data, value[key])}
    return data.draw(JSON)


def spoil(data: st.DataObject, path: Path) -> None:
    kinds = ["flip", "cut", "empty", "gone", "folder", "noise"] + ["json"] * 4 * (path.suffix != ".parquet")
    kind = data.draw(st.sampled_from(kinds))
    content = path.read_bytes()
    if not content:
        return
    if kind == "flip":
        place = data.draw(st.integers(0, len(content) - 1))
        flipped = content[place] ^ 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
    elif kind == "cut":
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(data.draw(st.binary(max_size=40)))
    elif kind in ("gone", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    else:
        try:
            path.write_text(json.dumps(mutate(data, json.loads(content))))
        except ValueError:
            path.write_text("[")


def read(node: Node) -> Any:
    """What later stages and the report read of a stage."""
    if node.stage.table:
        return shards.read_table(node.folder).to_dicts(), shards.read_dropped(node.folder).to_dicts()
    return {path.name: path.read_bytes() for path in (node.folder / "adapter").iterdir()}


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(data=st.data())
def test_a_spoilt_folder_is_refused_in_a_sentence_or_is_what_it_was(
    data: st.DataObject, whole: Path, made: list[Node], tmp_path_factory: pytest.TempPathFactory
) -> None:
    title = data.draw(st.sampled_from(TITLES))
    run = tmp_path_factory.mktemp("run", numbered=True)
    shutil.copytree(whole / title, run / title)
    (node,) = [node for node in made if node.title == title]
    node = replace(node, folder=run / title)
    before = read(node)
    names = sorted(path.relative_to(run).as_posix() for path in node.folder.rglob("*") if path.is_file())
    for _ in range(data.draw(st.integers(1, 2))):
        spoil(data, run / data.draw(st.sampled_from([name for name in names if (run / name).is_file()])))
    try:
        now = status.status_of(node, contents=True)
        if now.kind == "complete":
            status.mend_ledger(node)
            assert read(node) == before
        elif now.kind == "unfinished":
            stage._start(node, Runtime(), resume=True)
        elif now.kind in status.WRONG:
            assert now.changes
            status.clear(node)
            assert status.status_of(node).kind == "missing"
    except UserError:
        pass  # one sentence
    finally:
        shutil.rmtree(run)
