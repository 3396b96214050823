"""Rows of files that other tools wrote: JSON lines, JSON lists and Parquet, by one strict reader for all of them.

Whatever is wrong with a file is one sentence that names the file and the line: JSON that is broken, nested too deep or
holds a number of thousands of digits, text that is not Unicode (half a surrogate pair, broken UTF-8), damaged pages.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from croco.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
EXPECTED = "a .jsonl, .jsonl.gz, .json or .parquet file"
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
Located = tuple[str, Any]  # where a row is, as in "FILE, line 3", and the row


def file_rows(path: Path) -> Iterator[Located]:
    """(where, row) of each row of a file; raises UserError naming what cannot be read."""
    if not path.is_file():
        raise UserError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}, expected {EXPECTED}")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: expected {EXPECTED}")
    yield from _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)


def _json_rows(path: Path) -> Iterator[Located]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if path.suffix == ".json" and file.peek(1)[:1] == b"[":
                rows = parse_json(str(path), file.read())
                yield from ((f"{path}, item {number}", row) for number, row in enumerate(rows, start=1))
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, parse_json(where, line)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def parse_json(where: str, text: bytes) -> Any:
    """The value of some JSON in UTF-8; raises UserError that begins with `where`."""
    try:
        value = json.loads(text.decode("utf-8"))
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{where}: found {half!a}, half a surrogate pair, expected Unicode text") from None
    except RecursionError:
        raise UserError(f"{where}: expected a JSON object, found one nested too deep to be read") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number of more digits than Python reads
        raise UserError(f"{where}: expected a JSON object, found {str(error).partition(';')[0]}") from None
    return value


def _parquet_rows(path: Path) -> Iterator[Located]:
    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: expected a Parquet file, found after row {number}: {reason}") from None


def kind(value: Any) -> str:
    """What a value is, in a person's words."""
    if value is None:
        return "missing"
    if value in ("", [], {}):
        return "empty"
    names = {
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
