"""Atomic writes, markers, and tables that are what their schema says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from croco.errors import UserError
from croco.storage import files, shards
from croco.storage.schemas import DROPPED, PROMPTS, SCORES, TABLES, ledger
from toy_stages import prompt


def table(*numbers: int) -> pa.Table:
    return pa.Table.from_pylist([prompt(number) for number in numbers], schema=PROMPTS.schema)


def write(folder: Path, index: int, *numbers: int) -> None:
    counts = {"prompt": len(numbers)}
    shards.write_shard(
        folder, index, table(*numbers), PROMPTS.schema, read=counts, written=counts, dropped=None
    )


def test_only_shards_with_a_marker_are_read_in_order_of_their_number(tmp_path: Path) -> None:
    write(tmp_path, 10, 4)
    write(tmp_path, 2, 1, 0)
    shards.write_parquet(shards.shard_path(tmp_path, 3), table(9), PROMPTS.schema)
    (tmp_path / "other-arm").mkdir()
    write(tmp_path / "other-arm", 0, 8)
    assert shards.read_table(tmp_path)["prompt_id"].to_list() == ["1", "0", "4"]
    assert shards.read_table(tmp_path, ["language"]).columns == ["language"]
    assert [shard.rows for shard in shards.shards(tmp_path)] == [2, 1]


def test_a_folder_without_shards_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished shard"):
        shards.read_table(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"a": float("nan")})

    def fail(file: object) -> None:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        files.write_atomically(path, fail)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_conform_orders_casts_and_refuses(tmp_path: Path) -> None:
    columns = {
        "scorer": ["r"],
        "score": [0.5],
        "sample_id": [3],
        "language": ["da"],
        "prompt_id": ["a"],
        "parts": [None],
    }
    found = shards.conform(pa.table(columns), SCORES.schema)
    assert found.schema.equals(SCORES.schema)
    with pytest.raises(ValueError, match="columns are"):
        shards.conform(pa.table(columns | {"text": ["x"]}), SCORES.schema)
    with pytest.raises(ValueError, match="'scorer' holds 1 nulls"):
        shards.conform(pa.table(columns | {"scorer": pa.array([None], pa.string())}), SCORES.schema)
    with pytest.raises(pa.ArrowInvalid):
        shards.conform(pa.table(columns | {"sample_id": [2**40]}), SCORES.schema)


def test_ledgers_are_merged_and_counted(tmp_path: Path) -> None:
    drops = ledger([("prompt", "a", "en", None, "too long"), ("completion", "b", "en", 3, "cut")])
    shards.write_shard(
        tmp_path, 0, table(1), PROMPTS.schema, read={"prompt": 2}, written={"prompt": 1}, dropped=drops
    )
    write(tmp_path, 1, 2)
    assert shards.shards(tmp_path)[0].dropped == {"prompt": 1, "completion": 1}
    assert shards.merge_ledgers(tmp_path) == 2
    assert shards.read_dropped(tmp_path).rows() == [
        ("prompt", "a", "en", None, "too long"),
        ("completion", "b", "en", 3, "cut"),
    ]


@pytest.mark.parametrize("place", [0.3, 0.6])
def test_a_page_that_is_not_what_was_written_is_not_read(tmp_path: Path, place: float) -> None:
    path = tmp_path / "x.parquet"
    shards.write_parquet(path, table(*range(500)), PROMPTS.schema)
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.parquet is damaged"):
        shards.read_arrow(path)


def test_a_person_s_link_and_pipe_are_written_through(tmp_path: Path) -> None:
    real, link, dangling, pipe = (tmp_path / name for name in ("real.csv", "link.csv", "new.csv", "pipe"))
    real.write_text("old")
    link.symlink_to(real)
    dangling.symlink_to(tmp_path / "target.csv")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (link, dangling, pipe):
        files.write_for_user(path, "new")
    assert (real.read_text(), (tmp_path / "target.csv").read_text(), os.read(reader, 9)) == (
        "new",
        "new",
        b"new",
    )
    assert (link.is_symlink(), dangling.is_symlink(), pipe.is_fifo()) == (True, True, True)
    with pytest.raises(UserError, match="is a folder"):
        files.write_for_user(tmp_path, "new")


def test_a_folder_is_filled_under_another_name_only_if_it_is_ours(tmp_path: Path) -> None:
    partial, to = tmp_path / ".x.making", tmp_path / "x"
    partial.mkdir()
    (partial / "thesis.tex").touch()
    with pytest.raises(UserError, match="was not made by croco"), files.new_folder(to):
        pass
    (partial / "thesis.tex").rename(tmp_path / "thesis.tex")
    partial.rmdir()
    with pytest.raises(FileNotFoundError), files.new_folder(to) as made:
        (made / "no such folder" / "half").touch()
    assert not partial.exists()
    (partial / "folder").mkdir(parents=True)
    for name in (files.OWNER, "half"):  # as a killed process leaves it
        (partial / name).touch()
    with files.new_folder(to) as made:
        (made / "whole").touch()
        with pytest.raises(UserError, match="is being made by another croco process"), files.new_folder(to):
            pass
    assert [path.name for path in to.iterdir()] == ["whole"]
    with pytest.raises(UserError, match="not empty"), files.new_folder(to):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex", "x"]


def test_num_rows_names_a_missing_and_a_cut_file(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises(UserError, match="missing"):
        shards.num_rows(path)
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="not a whole Parquet file"):
        shards.num_rows(path)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.text(), st.text(), st.none() | st.integers(0, 2**31 - 1)), max_size=20))
def test_any_text_survives_the_disk(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple]) -> None:
    drops = ledger([("completion", text, "en", number, reason) for text, reason, number in rows])
    path = tmp_path_factory.mktemp("any") / "x.parquet"
    shards.write_parquet(path, drops, DROPPED.schema)
    assert pq.read_table(path).equals(drops)


def test_every_table_has_its_key_among_its_columns() -> None:
    for name, found in TABLES.items():
        assert set(found.key) <= set(found.schema.names), name
