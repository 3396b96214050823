"""Files of other tools, whole or damaged: rows with their place, or one sentence that names it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from croco.errors import UserError
from croco.storage.rows import file_rows, files_of


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"a": "\\ud83d!"}', r"line 2: found '\\ud83d', half a surrogate pair"),
        (b'{"a": "\xff"}', "line 2: expected a JSON object, found 'utf-8' codec"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 2: expected a JSON object, found Exceeds the limit"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 2: .*nested too deep"),
        (b'{"a": 1', "line 2: expected a JSON object"),
        (b'{"chosen": 1, "b": 2, "chosen": 3}', "line 2: .*found the key 'chosen' twice in one object"),
    ],
)
def test_a_line_that_is_no_json_is_named(line: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": "\\ud83d\\ude00"}\n' + line + b"\n")
    rows = file_rows(path)
    assert next(rows) == (f"{path}, line 1", {"a": "\U0001f600"})
    with pytest.raises(UserError, match=sentence) as error:
        next(rows)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("codec", ["snappy", "zstd", "gzip", "none"])
def test_damaged_pages_and_text_that_is_no_text(codec: str, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [f"x{n} " * 20 for n in range(3000)]}), path, compression=codec)
    content = bytearray(path.read_bytes())
    content[4000:4400] = bytes(byte ^ 0xFF for byte in content[4000:4400])
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.parquet: expected a Parquet file, found after row \d+: "):
        list(file_rows(path))
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"x\.parquet: expected a Parquet file"):
        list(file_rows(path))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf\n [{"a": 1}]')
    assert [row for name in ("x.jsonl", "x.json") for _, row in file_rows(tmp_path / name)] == [{"a": 1}] * 2


def test_a_cut_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"a": "b" * 1000}).encode())[:-12])
    with pytest.raises(UserError, match=r"x\.jsonl\.gz cannot be read"):
        list(file_rows(path))


def test_a_folder_stands_for_its_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("data/b.jsonl", "data/a.jsonl", "data/notes.txt"):
        (tmp_path / name).write_text('{"a": 1}\n')
    assert [path.name for path in files_of(tmp_path)] == ["a.jsonl", "b.jsonl"]
    assert [path.name for path in files_of(tmp_path, ["data/b*"])] == ["b.jsonl"]
    with pytest.raises(UserError, match=r"found notes\.txt"):
        files_of(tmp_path / "data" / "notes.txt")
    with pytest.raises(UserError, match="no such file"):
        files_of(tmp_path / "none.jsonl")
