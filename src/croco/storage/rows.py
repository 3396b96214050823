"""Rows of data that other tools wrote: JSON lines, JSON lists, Parquet, folders of them, and datasets of the hub.

One strict reader: whatever is wrong with a file is one sentence that names the file and the line."""

import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from croco.errors import UserError, one_line
from croco.storage import shards

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")  # of a folder; others in it are notes
EXPECTED = "a .jsonl, .jsonl.gz, .json or .parquet file"
HALVES = re.compile("[\ud800-\udfff]")  # of surrogate pairs
LINE_BYTES = 2**28
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
Located = tuple[str, Any]  # where a row is, as in "FILE, line 3", and the row


def files_of(source: str | Path, data_files: Sequence[str] = (), key: str = "") -> list[Path]:
    """The files of a name: a file, those of a folder (of its `data_files`), or those of a pattern. In a
    folder those are the finished shards of a stage, else its files, else those in `data`, `export` or `pairs`. Raises
    UserError, beginning with `key`, where there are none."""
    path = Path(os.path.expanduser(source))
    name = f"{key} = '{source!s:.200}'" if key else f"{path!s:.200}"
    if os.path.isfile(path):
        files = [path]
    elif os.path.isdir(path):
        files = [one for pattern in data_files for one in sorted(path.glob(pattern))] or _in_folder(path)
    elif glob.has_magic(str(path)):
        files = [Path(one) for one in sorted(glob.glob(str(path), recursive=True))]
    else:
        raise UserError(f"{name}: no such file")
    if not files:
        raise UserError(f"{name}: found no file in it, expected {EXPECTED}")
    for file in files:
        if HALVES.search(str(file)):
            raise UserError(f"{name}: the name {str(file)!a} is no Unicode text, expected another one")
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"{name}: found {file.name}, expected {EXPECTED}, or 'hf:NAME'")
    return files


def _in_folder(folder: Path) -> list[Path]:
    files = [shard.path for shard in shards.shards(folder)] or sorted(
        path
        for path in folder.iterdir()
        if path.name.endswith(DATA_SUFFIXES) and path.name != "dropped.parquet"
    )
    for below in ("data", "export", "pairs"):
        if not files and (folder / below).is_dir():
            files = _in_folder(folder / below)
    return files


def is_saved_dataset(source: str | Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the library datasets."""
    path = os.path.expanduser(source)
    return any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))


def dataset_rows(
    source: str,
    split: str,
    config: str | None = None,
    revision: str | None = None,
    data_files: Sequence[str] = (),
    key: str = "source",
) -> Iterator[Located]:
    """(where, row) of each row of 'hf:NAME' or of a folder that `save_to_disk` wrote."""
    import datasets

    try:
        if source.startswith("hf:"):
            name = os.path.expanduser(source.removeprefix("hf:"))
            files = list(data_files) or None
            rows = datasets.load_dataset(name, config, split=split, revision=revision, data_files=files)
        else:
            rows = datasets.load_from_disk(os.path.expanduser(source))
            rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
    except Exception as error:  # the library raises many kinds for one thing: not there
        of = f"config '{config}', split '{split}'" if config else f"split '{split}'"
        reason = "it has no rows" if type(error) is IndexError else one_line(error)
        raise UserError(f"{key}.source = '{source}' ({of}) cannot be loaded: {reason}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}{f', {config}' if config else ''}, row {number}", row


def hub_configs(source: str, revision: str | None) -> list[str]:
    """The names of the configs of 'hf:NAME'; none where they cannot be listed."""
    import datasets

    try:
        return list(
            datasets.get_dataset_config_names(
                os.path.expanduser(source.removeprefix("hf:")), revision=revision
            )
        )
    except (OSError, ValueError, RuntimeError):  # loading says what is wrong
        return []


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
            if path.suffix == ".json" and file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
                rows = parse_json(str(path), file.read())
                yield from ((f"{path}, item {number}", row) for number, row in enumerate(rows, start=1))
                return
            for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES), b""), start=1):
                where = f"{path}, line {number}"
                if len(line) == LINE_BYTES:
                    raise UserError(f"{where} has {LINE_BYTES:,} bytes or more, expected a row of a table")
                if line.strip():
                    yield where, parse_json(where, line)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def parse_json(where: str, text: bytes) -> Any:
    """The value of some JSON in UTF-8; raises UserError that begins with `where`."""
    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object)
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)!r} twice in one object")
    return values


def _parquet_rows(path: Path) -> Iterator[Located]:
    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: expected a Parquet file, found after row {number}: {one_line(error)}"
        ) from None


def kind(value: Any) -> str:
    """What a value is, in plain words."""
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
