"""The stage contract: skip, resume, drift, damage, balance, lock."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import toy_stages
from croco.config.runtime import Runtime
from croco.errors import StaleStage, UserError
from croco.pipeline import run, stage
from croco.pipeline import status as standing
from croco.pipeline.node import Node, Stage
from croco.storage import files, records, shards


def runtime(shard_prompts: int = 4) -> Runtime:
    return Runtime(shard_prompts=shard_prompts)


def toy(name: str, table: str, version: int = 1) -> Stage:
    return Stage(
        name=name,
        version=version,
        function=f"toy_stages:{name}",
        table=table,
        settings=lambda recipe, arm: {},
        inputs=lambda recipe, arm: [],
    )


def numbered(folder: Path, count: int = 10, version: int = 1) -> Node:
    return Node(toy("numbered", "prompts", version), None, folder / "numbered", {"count": count}, {})


def even(folder: Path, before: Node) -> Node:
    return Node(toy("even", "completions"), None, folder / "even", {}, {"numbered": before})


@pytest.fixture(autouse=True)
def _fresh_toys() -> None:
    toy_stages.CALLS.clear()
    toy_stages.FAIL_AT.clear()


def test_a_complete_stage_is_skipped_and_its_counts_balance(tmp_path: Path) -> None:
    first = numbered(tmp_path)
    stage.execute(first, runtime())
    found = stage.execute(even(tmp_path, first), runtime())
    assert found["state"] == "complete"
    assert found["counts"] == {
        "read": {"prompt": 10},
        "written": {"completion": 5, "prompt": 5},
        "dropped": {"prompt": 5},
    }
    assert shards.read_dropped(tmp_path / "even")["prompt_id"].to_list() == ["1", "3", "5", "7", "9"]
    assert shards.read_table(tmp_path / "even")["prompt_id"].to_list() == ["0", "2", "4", "6", "8"]
    assert toy_stages.CALLS == [0, 1, 2]
    stage.execute(first, runtime())
    assert toy_stages.CALLS == [0, 1, 2]


def test_an_unfinished_stage_redoes_only_what_is_missing(tmp_path: Path) -> None:
    node = numbered(tmp_path)
    toy_stages.FAIL_AT.add(1)
    with pytest.raises(RuntimeError, match="power"):
        stage.execute(node, runtime())
    assert standing.status_of(node).kind == "unfinished"
    # what a kill leaves behind: a temporary file, and a shard and a ledger whose marker was never written
    (node.folder / f"{files.TEMPORARY}123-part-00001.parquet").write_bytes(b"half")
    shards.shard_path(node.folder, 2).write_bytes(b"half")
    shards.ledger_path(node.folder, 2).write_bytes(b"half")
    (node.folder / "scratch").mkdir()
    toy_stages.FAIL_AT.clear()
    # another shard size now would number the rows otherwise: the stage keeps the one it began with
    found = stage.execute(node, runtime(shard_prompts=2))
    assert toy_stages.CALLS == [0, 1, 2]
    assert found["starts"] == 2
    assert shards.read_table(node.folder)["prompt_id"].to_list() == [str(number) for number in range(10)]
    names = sorted(path.name for path in node.folder.iterdir())
    assert names == sorted(
        [f"part-0000{i}.{end}" for i in range(3) for end in ("done", "parquet")]
        + ["dropped.parquet", "stage.json"]
    )


def test_a_kill_while_the_scratch_goes_leaves_a_complete_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = numbered(tmp_path)

    def killed(node: Node) -> None:
        (node.folder / "scratch").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stage, "remove_scratch", killed)
        with pytest.raises(KeyboardInterrupt):
            stage.execute(node, runtime())
    assert standing.status_of(node).kind == "complete"
    assert (node.folder / "scratch").exists()
    said: list[str] = []
    run.run_node(node, runtime(), said.append)
    assert "complete, skipped" in said[0]
    assert not (node.folder / "scratch").exists()


def test_a_kill_while_the_first_record_is_written_leaves_nothing(tmp_path: Path) -> None:
    node = numbered(tmp_path)
    node.folder.mkdir()
    half = node.folder / ".tmp-3164-stage.json"
    half.write_text("{")
    assert standing.status_of(node).kind == "missing"
    stage.execute(node, runtime())
    assert not half.exists()


def test_drift_stops_and_names_what_changed_and_through_which_input(tmp_path: Path) -> None:
    first = numbered(tmp_path)
    stage.execute(first, runtime())
    stage.execute(even(tmp_path, first), runtime())
    changed = numbered(tmp_path, count=12, version=2)
    with pytest.raises(StaleStage, match=r"count: 10 → 12.*version: 1 → 2"):
        stage.execute(changed, runtime())
    (change,) = standing.status_of(even(tmp_path, changed)).changes
    assert change == f"its input numbered: {first.fingerprint} → {changed.fingerprint}"
    assert shards.read_table(tmp_path / "numbered").height == 10


def test_runtime_and_libraries_are_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    node = numbered(tmp_path)
    stage.execute(node, runtime(shard_prompts=4))
    found = files.read_json(node.folder / "stage.json")
    assert "transformers" in found["libraries"]
    assert found["facts"] == {"device": "none"}
    found["libraries"]["transformers"] = "1.0"
    files.write_json(node.folder / "stage.json", found)
    assert standing.status_of(node).kind == "complete"


@pytest.mark.parametrize("damage", ["cut", "gone", "marker"])
def test_damage_to_a_complete_stage_is_found(tmp_path: Path, damage: str) -> None:
    node = numbered(tmp_path)
    stage.execute(node, runtime())
    path = shards.shard_path(node.folder, 1)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "gone":
        path.unlink()
    else:
        shards.marker_path(node.folder, 1).unlink()
    status = standing.status_of(node)
    assert status.kind == "damaged"
    assert str(node.folder) in status.changes[0]


def test_a_file_that_a_stage_without_a_table_made_is_missed(tmp_path: Path) -> None:
    node = Node(replace(toy("page", ""), makes=("page.html",)), None, tmp_path / "page", {}, {})
    assert stage.execute(node, runtime())["files"] == {"page.html": 2}
    assert standing.status_of(node).kind == "complete"
    (node.folder / "page.html").unlink()
    assert standing.status_of(node).changes == (f"{node.folder / 'page.html'} is missing, expected 2 bytes",)


def test_a_row_lost_in_silence_stops_the_stage(tmp_path: Path) -> None:
    node = Node(toy("silent_loss", "completions"), None, tmp_path / "x", {}, {})
    with pytest.raises(ValueError, match="read 2 prompts, but wrote 1 and dropped 0"):
        stage.execute(node, runtime())
    assert shards.shards(node.folder) == []


def test_a_stage_that_returns_early_is_not_complete(tmp_path: Path) -> None:
    node = Node(toy("unfinished", "completions"), None, tmp_path / "x", {}, {})
    with pytest.raises(UserError, match="1 finished shards, expected 2"):
        stage.execute(node, runtime())
    assert standing.status_of(node).kind == "unfinished"


def test_an_input_must_be_accounted_for_in_full(tmp_path: Path) -> None:
    first = numbered(tmp_path)
    stage.execute(first, runtime())
    reader = replace(toy("first_half", "completions"), reads_all=("prompt", "numbered"))
    node = Node(reader, None, tmp_path / "reader", {}, {"numbered": first})
    with pytest.raises(ValueError, match="read 5 prompts of numbered's 10"):
        stage.execute(node, runtime())
    assert standing.status_of(node).kind == "unfinished"


def test_a_removal_takes_what_the_stage_made_and_nothing_else(tmp_path: Path) -> None:
    node = numbered(tmp_path)
    stage.execute(node, runtime())
    (node.folder / "notes.txt").write_text("mine")
    (node.folder / "keep").mkdir()
    (node.folder / "keep" / "part-00000.parquet").write_text("mine")
    files.write_json(node.folder / "arm" / "stage.json", {})
    (node.folder / "scratch").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    standing.clear(node)
    assert sorted(path.name for path in node.folder.iterdir()) == ["arm", "keep", "notes.txt"]
    assert (node.folder / "keep" / "part-00000.parquet").read_text() == "mine"
    assert (tmp_path / "elsewhere").is_dir()


@pytest.mark.parametrize("name", ["train.jsonl", "part-00000.parquet", "more/train.jsonl"])
def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    node = numbered(tmp_path)
    path = node.folder / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(UserError, match="croco has not made it"):
        stage.execute(node, runtime())
    assert [one for one in node.folder.rglob("*") if one.is_file()] == [path]
    assert path.read_text() == "mine"


def test_a_removal_that_was_cut_short_is_a_missing_stage(tmp_path: Path) -> None:
    node = numbered(tmp_path)
    stage.execute(node, runtime())
    found = records.read_record(node.folder)
    found["state"] = "removed"
    records.write_record(node.folder, found)
    shards.shard_path(node.folder, 0).unlink()
    assert standing.status_of(node).kind == "missing"
    assert stage.execute(node, runtime())["starts"] == 1
    assert shards.read_table(node.folder).height == 10


@pytest.mark.parametrize(
    "text", ["{}", "[]", "null", "{", "", '{"state": "complete"}', "[" * 100_000, "9" * 5000]
)
@pytest.mark.parametrize("name", ["stage.json", "part-00000.done"])
def test_a_record_of_another_shape_is_one_sentence_and_a_rebuild_helps(
    tmp_path: Path, name: str, text: str
) -> None:
    node = numbered(tmp_path)
    stage.execute(node, runtime())
    (node.folder / name).write_text(text)
    now = standing.status_of(node)
    assert (now.kind, len(now.changes)) == ("damaged", 1)
    assert str(node.folder / name) in now.changes[0]
    with pytest.raises(StaleStage, match="run again with --rebuild"):
        standing.stop_if_wrong({node: now})
    standing.clear_wrong({node: now}, [node], print)
    assert standing.status_of(node).kind == "missing"
    stage.execute(node, runtime())
    assert standing.status_of(node, contents=True).kind == "complete"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_shards", "3"),
        ("starts", 0),
        ("science", {}),
        ("counts", {"read": {"prompt": -1}}),
        ("facts", []),
    ],
)
def test_a_value_of_another_kind_is_named(tmp_path: Path, key: str, value: object) -> None:
    node = numbered(tmp_path)
    found = stage.execute(node, runtime())
    files.write_json(node.folder / "stage.json", {**found, key: value})
    assert f"no record of a stage at '{key}" in standing.status_of(node).changes[0]


def test_one_flipped_bit_is_seen_when_the_stage_is_read(tmp_path: Path) -> None:
    first = numbered(tmp_path)
    stage.execute(first, runtime())
    path = shards.shard_path(first.folder, 1)
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(StaleStage, match=r"part-00001.*--rebuild to remove numbered"):
            stage.execute(even(tmp_path, first), runtime())
    assert standing.status_of(first, contents=True).kind == "damaged"
    path.write_bytes(whole)
    assert stage.execute(even(tmp_path, first), runtime())["state"] == "complete"


def test_a_damaged_shard_of_an_unfinished_stage_is_made_again(tmp_path: Path) -> None:
    node = numbered(tmp_path)
    toy_stages.FAIL_AT.add(2)
    with pytest.raises(RuntimeError, match="power"):
        stage.execute(node, runtime())
    toy_stages.FAIL_AT.clear()
    content = bytearray(shards.shard_path(node.folder, 0).read_bytes())
    content[50] ^= 1
    shards.shard_path(node.folder, 0).write_bytes(content)
    shards.marker_path(node.folder, 1).write_text("{}")
    stage.execute(node, runtime())
    assert toy_stages.CALLS == [0, 1, 0, 1, 2]
    assert shards.read_table(node.folder)["prompt_id"].to_list() == [str(number) for number in range(10)]


def test_a_lost_ledger_is_written_again_from_those_of_the_shards(tmp_path: Path) -> None:
    first = numbered(tmp_path)
    stage.execute(first, runtime())
    node = even(tmp_path, first)
    stage.execute(node, runtime())
    path = node.folder / "dropped.parquet"
    whole = path.read_bytes()
    assert not standing.mend_ledger(node)
    path.unlink()
    assert standing.mend_ledger(node)
    assert path.read_bytes() == whole


def test_a_run_is_locked_against_a_second_process(tmp_path: Path) -> None:
    with stage.lock(tmp_path), pytest.raises(UserError, match="in use by another"), stage.lock(tmp_path):
        pass
    with stage.lock(tmp_path):
        pass


def test_an_attempt_that_made_nothing_holds_nobody_up(tmp_path: Path) -> None:
    toy_stages.FAIL_AT.add(0)
    with pytest.raises(RuntimeError, match="power"):
        stage.execute(numbered(tmp_path), runtime())
    toy_stages.FAIL_AT.clear()
    assert stage.execute(numbered(tmp_path, count=3), runtime())["counts"]["written"] == {"prompt": 3}
