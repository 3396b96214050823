"""Tables on disk: sharded Parquet, atomic writes, done markers, the drop ledger.

A finished shard is three files, written in this order: its ledger (`part-00007.dropped.parquet`, when rows were left
out), the shard (`part-00007.parquet`), the marker (`part-00007.done`, JSON with counts and digests). A shard without
its marker does not exist for any reader, so SIGKILL and power loss leave nothing that looks whole. Which shards a stage
has to write, and when a stage is complete, is `pipeline/stage.py`.

Nothing is removed or replaced here but files of our own names in a folder that has our record.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import IO, Any, Literal, NotRequired, cast

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import (
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    with_config,
)
from typing_extensions import TypedDict

from croco.errors import UserError
from croco.storage.schemas import DROPPED

TEMPORARY = ".tmp-"
RECORD = "stage.json"
OWNER = ".croco"  # in a folder that we fill under another name before it takes its own
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MARKER = re.compile(r"part-(\d{5,})\.done")
OURS = re.compile(r"part-\d{5,}(\.done|(\.dropped)?\.parquet)|dropped\.parquet|scratch|\.tmp-.*")
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")  # as safetensors says what the system said
TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container|file write failed|I/O error")

Counts = dict[str, NonNegativeInt]


@with_config(ConfigDict(extra="allow", strict=True))
class Science(TypedDict):
    """What a fingerprint is the digest of."""

    name: str
    version: int
    arm: str | None
    settings: dict[str, Any]
    inputs: dict[str, str]


@with_config(ConfigDict(extra="allow", strict=True))
class Record(TypedDict):
    """A stage's `stage.json`; further keys say where and with what it was made."""

    stage: str
    arm: str | None
    state: Literal["running", "complete", "removed"]
    fingerprint: str
    science: Science
    shard_prompts: PositiveInt
    num_shards: NonNegativeInt | None
    counts: dict[str, Counts]
    seconds: NonNegativeFloat
    starts: PositiveInt
    facts: dict[str, Any]
    files: NotRequired[Counts]  # of a stage without a table: names and sizes
    digests: NotRequired[dict[str, str]]  # of these files
    commit: NotRequired[str | None]
    libraries: NotRequired[dict[str, str]]
    machine: NotRequired[str]


@with_config(ConfigDict(strict=True))
class Marker(TypedDict):
    """A finished shard's marker; those of earlier versions have no digests."""

    rows: NonNegativeInt
    read: Counts
    written: Counts
    dropped: Counts
    digests: NotRequired[dict[str, str]]


_RECORD, _MARKER = TypeAdapter(Record), TypeAdapter(Marker)


@dataclass(frozen=True)
class Shard:
    """A finished shard: its number and what its marker counted."""

    index: int
    path: Path
    read: dict[str, int]
    written: dict[str, int]
    dropped: dict[str, int]
    rows: int
    digests: dict[str, str] = field(default_factory=dict)  # of its files, by name

    @property
    def ledger(self) -> Path:
        return ledger_path(self.path.parent, self.index)


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.parquet"


def ledger_path(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.dropped.parquet"


def marker_path(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.done"


# Whole files --------------------------------------------------------------------------------------------------------


def reason(error: OSError | ValueError) -> str:
    """Why the system refused a path, in a few words."""
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around code that writes `path`: what the system refuses is one sentence, which safetensors and torch hide."""
    full = "make room and run the same command again"
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        if error.errno in FULL:
            raise UserError(f"{path} cannot be written ({reason(error)}); {full}") from None
        raise UserError(f"{path} cannot be written: {reason(error)}") from None
    except Exception as error:
        words = " ".join(str(error).split())
        if type(error).__name__ == "SafetensorError" or isinstance(error, RuntimeError):
            if number := SYSTEM_ERROR.search(words):
                raise UserError(
                    f"{path} cannot be written ({os.strerror(int(number[1])).lower()}); {full}"
                ) from None
            if TORCH_WRITER.search(words):
                raise UserError(f"{path} cannot be written ({words[:200]}); {full}") from None
        raise


def _write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Temporary name in the same folder, fsync, rename, fsync of the folder: whole or not there at all."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_for_user(path: Path, text: str) -> None:
    """Write the file that a person named: through a link, and straight into a pipe or device; raises UserError."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected the name of a file")
    if path.exists() and not path.is_file():
        with writing(path), path.open("w", encoding="utf-8") as file:
            file.write(text)
    else:
        write_text(path.resolve(), text)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Make the contents of a folder's files, which others wrote, outlive a power cut."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    _write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all; numbers that JSON does not have (nan, inf) are an error."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises UserError naming it when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, found {error}") from None


def _read_shaped(path: Path, shape: TypeAdapter[Any], name: str) -> Any:
    """A JSON file of a known shape; raises UserError naming the first key that is off."""
    try:
        return shape.validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        where = f" at '{key}'" if key else ""
        raise UserError(f"{path} is no {name}{where}: {first['msg'].lower()}") from None


# Records ------------------------------------------------------------------------------------------------------------


def read_record(folder: Path) -> Record:
    """A stage's `stage.json`; raises UserError when it is missing or not the record of a stage."""
    return cast(Record, _read_shaped(folder / RECORD, _RECORD, "record of a stage"))


def write_record(folder: Path, record: Record) -> None:
    """Write a stage's `stage.json`."""
    write_json(folder / RECORD, record)


def state(folder: Path) -> str:
    """ "complete", "running", or "missing" for a folder without a stage; raises UserError as `read_record`."""
    if not os.path.lexists(folder / RECORD):
        return "missing"
    found = read_record(folder)["state"]
    return "missing" if found == "removed" else found


# Folders that we empty ----------------------------------------------------------------------------------------------


def check_new_folder(folder: Path) -> None:
    """Raise UserError unless a folder that a person named is new or empty, and not the one we stand in."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty, expected a new folder")
    if folder.resolve() == Path.cwd():
        raise UserError(f"{folder} is the current folder, expected a new one")


def check_own_folder(folder: Path, record: str, keys: Sequence[str], made: re.Pattern[str] = OURS) -> None:
    """Raise UserError unless a folder that a person named is new, or one that a command of ours made before.

    That one holds the JSON file `record` with these keys, and else only files whose path in it `made` matches.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return check_new_folder(folder)
    if not (folder / record).is_file():
        raise UserError(f"{folder} is not empty and holds no {record} of ours, expected a new folder")
    there = read_json(folder / record)
    if not isinstance(there, dict) or not set(keys) <= there.keys():
        raise UserError(f"{folder / record} is not what croco writes, expected a new folder")
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name != record and not path.is_dir() and not made.fullmatch(name):
            raise UserError(f"{path} was not made by croco, expected a new folder")
    return None


def begin_folder(folder: Path) -> None:
    """An empty folder of ours, marked as such, to be renamed by `finish_folder`; raises UserError for another's."""
    if os.path.lexists(folder):
        if not (folder / OWNER).is_file():
            raise UserError(f"{folder} was not made by croco, expected no file or folder of this name")
        shutil.rmtree(folder)
    with writing(folder):
        folder.mkdir(parents=True)
        (folder / OWNER).touch()


def finish_folder(folder: Path, to: Path) -> None:
    """Give a folder of `begin_folder` its name, which is new or that of an empty folder."""
    (folder / OWNER).unlink()
    sync_files(folder)
    with writing(to):
        folder.rename(to)
    sync_folder(to.parent)


def remove(path: Path) -> None:
    """Remove a file, a link (never what it leads to), or a folder that is not another stage's."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    elif OURS.fullmatch(path.name) and path.suffix:
        raise UserError(f"{path} is a folder, expected a file")
    elif not (path / RECORD).exists():
        shutil.rmtree(path)


def remove_folder(folder: Path) -> None:
    """Remove a folder that `check_own_folder` has looked into; a link to one is only unlinked."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        shutil.rmtree(folder)


# Parquet ------------------------------------------------------------------------------------------------------------


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with exactly the schema's columns, order and types.

    Raises ValueError for a missing or unknown column, a value that does not fit its type, or a null in a required
    column: a stage that writes such a table has a bug.
    """
    if set(table.column_names) != set(schema.names):
        raise ValueError(f"columns are {sorted(table.column_names)}, expected {sorted(schema.names)}")
    table = table.select(schema.names).cast(pa.schema([pa.field(f.name, f.type) for f in schema]), safe=True)
    for column in schema:
        if not column.nullable and (nulls := table.column(column.name).null_count):
            raise ValueError(f"column '{column.name}' holds {nulls} nulls, expected none")
    return pa.Table.from_arrays(table.columns, schema=schema)


def write_parquet(path: Path, table: pa.Table, schema: pa.Schema) -> str:
    """Write a Parquet file (zstd, with checksums) whole or not at all, cast to the schema; returns its digest."""
    sink = pa.BufferOutputStream()
    pq.write_table(conform(table, schema), sink, compression="zstd", write_page_checksum=True)
    content = memoryview(sink.getvalue())
    _write_atomically(path, lambda file: file.write(content))
    return blake2b(content, digest_size=16).hexdigest()


def read_arrow(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, its pages held against their checksums; raises UserError when it is missing or damaged."""
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        return file.read(columns=None if columns is None else list(columns))
    except (OSError, ValueError) as error:  # ArrowInvalid, and text that is no UTF-8, are ValueErrors
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path} is missing") from None
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """`read_arrow` as a data frame."""
    return pl.DataFrame(pl.from_arrow(read_arrow(path, columns)))


def num_rows(path: Path) -> int:
    """Rows of a Parquet file, from its metadata; raises UserError when it is missing or cut."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, ValueError) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else "not a whole Parquet file"
        raise UserError(f"{path} is {reason}") from None


def check_digest(path: Path, digest: str) -> None:
    """Raise UserError when a file's bytes are not those that were written; a file is read once for each change."""
    try:
        stat = path.stat()
        found = _digest(path.resolve(), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    if found != digest:
        raise UserError(f"{path} is damaged: its bytes are not those that were written")


@lru_cache(maxsize=100_000)
def _digest(path: Path, size: int, time: int) -> str:
    with path.open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Digests of some of a folder's files, as `check_digest` takes them."""
    stats = {name: (folder / name).stat() for name in names}
    return {
        name: _digest((folder / name).resolve(), stat.st_size, stat.st_mtime_ns)
        for name, stat in stats.items()
    }


# Shards -------------------------------------------------------------------------------------------------------------


def shards(folder: Path) -> list[Shard]:
    """The finished shards of a folder, in order; sub-folders are other stages and are not looked at."""
    found = [read_shard(path) for path in folder.glob("part-*.done") if MARKER.fullmatch(path.name)]
    return sorted(found, key=lambda shard: shard.index)


def read_shard(path: Path) -> Shard:
    """The shard of a marker; raises UserError when the marker is damaged."""
    match = MARKER.fullmatch(path.name)
    assert match is not None
    marker = cast(Marker, _read_shaped(path, _MARKER, "marker of a shard"))
    return Shard(index=int(match[1]), path=shard_path(path.parent, int(match[1])), **marker)


def check_shard(shard: Shard, contents: bool = False) -> None:
    """Raise UserError when a shard's files are missing, cut, or (with `contents`) not the bytes that were written."""
    for path, expected in ((shard.path, shard.rows), (shard.ledger, sum(shard.dropped.values()))):
        rows = num_rows(path) if expected or path == shard.path else 0
        if rows != expected:
            raise UserError(f"{path} holds {rows} rows, but its marker says {expected}")
    if contents:
        for name, digest in shard.digests.items():
            check_digest(shard.path.parent / name, digest)


def write_shard(
    folder: Path,
    index: int,
    table: pa.Table,
    schema: pa.Schema,
    *,
    read: Mapping[str, int],
    written: Mapping[str, int],
    dropped: pa.Table | None,
) -> None:
    """One finished shard: ledger, shard, marker, each whole before the next begins."""
    drops: dict[str, int] = {}
    digests: dict[str, str] = {}
    if dropped is not None and dropped.num_rows:
        ledger = ledger_path(folder, index)
        digests[ledger.name] = write_parquet(ledger, dropped, DROPPED.schema)
        drops = count_units(dropped)
    path = shard_path(folder, index)
    digests[path.name] = write_parquet(path, table, schema)
    marker = {"rows": table.num_rows, "read": dict(read), "written": dict(written), "dropped": drops}
    write_json(marker_path(folder, index), {**marker, "digests": digests})


def count_units(dropped: pa.Table) -> dict[str, int]:
    """How many rows of each unit a ledger holds."""
    counts = dropped.column("unit").value_counts().to_pylist()
    return {str(row["values"]): int(row["counts"]) for row in counts}


def remove_unfinished(folder: Path) -> list[str]:
    """Remove what a killed process left: temporary files, shards without a marker, and shards that are damaged, which
    are made again; returns a sentence for each of those."""
    finished, damage = set(), []
    for marker in folder.glob("part-*.done"):
        if MARKER.fullmatch(marker.name):
            try:
                shard = read_shard(marker)
                check_shard(shard, contents=True)
                finished.add(shard.index)
            except UserError as error:
                damage.append(str(error))
                remove(marker)
    for path in folder.iterdir():
        match = re.fullmatch(r"part-(\d{5,})(\.dropped)?\.parquet", path.name)
        if path.name.startswith(TEMPORARY) or (match and int(match[1]) not in finished):
            remove(path)
    return damage


def read_table(folder: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """All finished shards of a stage's folder, in shard order."""
    tables = [read_arrow(shard.path, columns) for shard in shards(folder)]
    if not tables:
        raise UserError(f"{folder} holds no finished shard")
    return pl.DataFrame(pl.from_arrow(pa.concat_tables(tables)))


def merge_ledgers(folder: Path) -> int:
    """Write the ledgers of all finished shards as one `dropped.parquet`, empty when nothing was; returns its rows."""
    ledgers = [read_arrow(shard.ledger) for shard in shards(folder) if shard.dropped]
    merged = pa.concat_tables(ledgers) if ledgers else DROPPED.schema.empty_table()
    write_parquet(folder / "dropped.parquet", merged, DROPPED.schema)
    return int(merged.num_rows)


def read_dropped(folder: Path) -> pl.DataFrame:
    """The ledger of a complete stage; may be empty."""
    return read_parquet(folder / "dropped.parquet")
