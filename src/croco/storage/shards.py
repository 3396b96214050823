"""Tables on disk: sharded Parquet, atomic writes, markers, the ledger.

A finished shard is three files, written in this order: its ledger (`part-00007.dropped.parquet`, when rows were left
out), the shard (`part-00007.parquet`), the marker (`part-00007.done`, JSON with counts and digests). A shard without
its marker does not exist for any reader, so SIGKILL and power loss leave nothing that looks whole."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from croco.errors import UserError, one_line
from croco.storage.files import TEMPORARY, check_digest, remove, write_atomically, write_json
from croco.storage.records import read_marker, read_record
from croco.storage.schemas import DROPPED

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


# Parquet ------------------------------------------------------------------------------------------------------------


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with exactly the schema's columns, order and types. Raises ValueError for a missing or unknown column,
    a value that does not fit its type, or a null in a required column: the stage that writes it has a bug."""
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
    write_atomically(path, lambda file: file.write(content))
    return blake2b(content, digest_size=16).hexdigest()


def read_arrow(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, its pages held against their checksums; raises UserError when it is missing or damaged."""
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        return file.read(columns=None if columns is None else list(columns))
    except (OSError, ValueError) as error:  # ArrowInvalid, and text that is no UTF-8, are ValueErrors
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path} is missing") from None
        raise UserError(f"{path} is damaged: {one_line(error)}") from None


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


# Shards -------------------------------------------------------------------------------------------------------------


def shards(folder: Path) -> list[Shard]:
    """The finished shards of a folder, in order; sub-folders are other stages and are not looked at."""
    finished = [read_shard(path) for path in folder.glob("part-*.done") if MARKER.fullmatch(path.name)]
    return sorted(finished, key=lambda shard: shard.index)


def read_shard(path: Path) -> Shard:
    """The shard of a marker; raises UserError when the marker is damaged."""
    match = MARKER.fullmatch(path.name)
    assert match is not None
    index = int(match[1])
    return Shard(index=index, path=shard_path(path.parent, index), **read_marker(path))


def check_shard(shard: Shard, contents: bool = False) -> None:
    """Raise UserError when a shard's files are missing, cut, or (with `contents`) not the bytes that were written."""
    for path, expected in ((shard.path, shard.rows), (shard.ledger, sum(shard.dropped.values()))):
        rows = num_rows(path) if expected or path == shard.path else 0
        if rows != expected:
            raise UserError(f"{path} holds {rows} rows, but its marker says {expected}")
    if contents:
        for name, digest in shard.digests.items():
            check_digest(shard.path.parent / name, digest)


def check_contents(folder: Path) -> None:
    """Raise UserError when a file of a complete stage does not hold the bytes that were written."""
    record = read_record(folder)
    for name, digest in record.get("digests", {}).items() if "files" in record else ():
        check_digest(folder / name, digest)
    for shard in shards(folder):
        check_shard(shard, contents=True)


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
    """Remove temporary files, shards without a marker, and damaged shards, which are made again; returns a sentence for
    each of those."""
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


def read_table(folder: str | Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """All finished shards of a stage's folder, in shard order."""
    folder = Path(folder)
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


def read_dropped(folder: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """The ledger of a complete stage; may be empty."""
    return read_parquet(folder / "dropped.parquet", columns)


def reasons(ledger: pl.DataFrame) -> list[tuple[str, str, int]]:
    """(unit, reason, how many), the most frequent first. What follows a reason's colon is about one row and not
    counted apart; that of a flag says which completion it marks."""
    reason = pl.col("reason")
    short = pl.when(pl.col("unit") == "flag").then(reason).otherwise(reason.str.split(": ").list.first())
    counted = ledger.group_by("unit", short.alias("reason")).len()
    return counted.sort("len", "unit", "reason", descending=[True, False, False]).rows()
