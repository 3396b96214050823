"""Tables on disk: sharded Parquet, atomic writes, done markers, the drop ledger.

A finished shard is three files, written in this order: its ledger (`part-00007.dropped.parquet`, when rows were left
out), the shard (`part-00007.parquet`), the marker (`part-00007.done`, JSON with counts). A shard without its marker
does not exist for any reader, so SIGKILL and power loss leave nothing that looks whole. Which shards a stage has to
write, and when a stage is complete, is `stage.py`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from croco.errors import UserError
from croco.records import DROPPED

TEMPORARY = ".tmp-"
MARKER = re.compile(r"part-(\d{5,})\.done")


@dataclass(frozen=True)
class Shard:
    """A finished shard: its number and what its marker counted."""

    index: int
    path: Path
    read: dict[str, int]
    written: dict[str, int]
    dropped: dict[str, int]
    rows: int

    @property
    def ledger(self) -> Path:
        return ledger_path(self.path.parent, self.index)


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.parquet"


def ledger_path(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.dropped.parquet"


def marker_path(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.done"


def _write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Temporary name in the same folder, fsync, rename, fsync of the folder: whole or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk does not say what did not fit
        raise
    sync_folder(path.parent)


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
    """Read a JSON file; raises UserError naming the line when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (
        ValueError,
        RecursionError,
    ) as error:  # no JSON or UTF-8, a number of thousands of digits, too deep
        raise UserError(f"{path}: expected JSON, found {error}") from None


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with exactly the schema's columns, order and types.

    Raises ValueError for a missing or unknown column, a value that does not fit its type, or a null in a required
    column: a stage that writes such a table has a bug.
    """
    if set(table.column_names) != set(schema.names):
        raise ValueError(f"columns are {sorted(table.column_names)}, expected {sorted(schema.names)}")
    table = table.select(schema.names).cast(pa.schema([pa.field(f.name, f.type) for f in schema]), safe=True)
    for field in schema:
        if not field.nullable and table.column(field.name).null_count:
            raise ValueError(
                f"column '{field.name}' holds {table.column(field.name).null_count} nulls, expected none"
            )
    return pa.Table.from_arrays(table.columns, schema=schema)


def write_parquet(path: Path, table: pa.Table, schema: pa.Schema) -> None:
    """Write a Parquet file (zstd) whole or not at all, checked and cast to the schema."""
    conformed = conform(table, schema)
    _write_atomically(path, lambda file: pq.write_table(conformed, file, compression="zstd"))


def shards(folder: Path) -> list[Shard]:
    """The finished shards of a folder, in order; sub-folders are other stages and are not looked at."""
    found = []
    for path in folder.glob("part-*.done"):
        match = MARKER.fullmatch(path.name)
        if match is None:
            continue
        index, marker = int(match[1]), read_json(path)
        found.append(
            Shard(
                index=index,
                path=shard_path(folder, index),
                read=marker["read"],
                written=marker["written"],
                dropped=marker["dropped"],
                rows=marker["rows"],
            )
        )
    return sorted(found, key=lambda shard: shard.index)


def num_rows(path: Path) -> int:
    """Rows of a Parquet file, from its metadata; raises UserError when it is missing or cut."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowInvalid) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else "not a whole Parquet file"
        raise UserError(f"{path} is {reason}") from None


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
    if dropped is not None and dropped.num_rows:
        write_parquet(ledger_path(folder, index), dropped, DROPPED.schema)
        drops = count_units(dropped)
    write_parquet(shard_path(folder, index), table, schema)
    counts = {"rows": table.num_rows, "read": dict(read), "written": dict(written), "dropped": drops}
    write_json(marker_path(folder, index), counts)


def count_units(dropped: pa.Table) -> dict[str, int]:
    """How many rows of each unit a ledger holds."""
    counts = dropped.column("unit").value_counts().to_pylist()
    return {str(row["values"]): int(row["counts"]) for row in counts}


def remove_unfinished(folder: Path) -> None:
    """Remove temporary files, and shards and ledgers without a marker: leftovers of a killed process."""
    finished = {shard.index for shard in shards(folder)}
    for path in folder.iterdir():
        if path.is_file() and path.name.startswith(TEMPORARY):
            path.unlink()
        match = re.fullmatch(r"part-(\d{5,})(\.dropped)?\.parquet", path.name)
        if match and int(match[1]) not in finished:
            path.unlink()


def read_parquet(path: Path) -> pl.DataFrame:
    """A Parquet file; raises UserError when it is missing or broken."""
    try:
        return pl.DataFrame(pl.from_arrow(pq.ParquetFile(path).read()))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from None


def read_table(folder: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """All finished shards of a stage's folder, in shard order."""
    paths = [shard.path for shard in shards(folder)]
    if not paths:
        raise UserError(f"{folder} holds no finished shard")
    tables = [pq.ParquetFile(path).read(columns=None if columns is None else list(columns)) for path in paths]
    frame = pl.from_arrow(pa.concat_tables(tables))
    assert isinstance(frame, pl.DataFrame)
    return frame


def merge_ledgers(folder: Path) -> int:
    """Write the ledgers of all finished shards as one `dropped.parquet`, empty when nothing was; returns its rows."""
    ledgers = [pq.ParquetFile(shard.ledger).read() for shard in shards(folder) if shard.dropped]
    merged = pa.concat_tables(ledgers) if ledgers else DROPPED.schema.empty_table()
    write_parquet(folder / "dropped.parquet", merged, DROPPED.schema)
    return int(merged.num_rows)


def read_dropped(folder: Path) -> pl.DataFrame:
    """The ledger of a complete stage; may be empty."""
    frame = pl.from_arrow(pq.ParquetFile(folder / "dropped.parquet").read())
    assert isinstance(frame, pl.DataFrame)
    return frame
