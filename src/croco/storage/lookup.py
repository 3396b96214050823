"""Texts by key from sharded tables, without holding a table's texts in memory.

`locate` notes for every row which shard holds it, and may reduce each shard to what is needed; `gather` opens
only the shards it must. Which rows are wanted is decided elsewhere, on numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from croco.errors import UserError
from croco.storage import shards


def locate(
    folder: Path,
    key: Sequence[str],
    columns: Sequence[str] = (),
    reduce: Callable[[pl.DataFrame], pl.DataFrame] | None = None,
) -> pl.DataFrame:
    """The key columns of all finished shards and the number of the shard that holds each row.

    With `reduce`, what it makes of every shard's key and `columns`; it must keep the key. Raises UserError
    for a folder without shards or a file that is no Parquet.
    """
    parts = []
    for shard in shards.shards(folder):
        rows = shards.read_parquet(shard.path, [*key, *columns])
        parts.append((reduce(rows) if reduce else rows).with_columns(shard=pl.lit(shard.index, pl.Int32)))
    if not parts:
        raise UserError(f"{folder} holds no finished shard")
    return pl.concat(parts)


def gather(folder: Path, wanted: pl.DataFrame, key: Sequence[str], columns: Sequence[str]) -> pl.DataFrame:
    """The columns of the wanted rows (key and `shard`), in their order; a row may be wanted more than once.

    Raises UserError when a shard no longer holds a row that it held.
    """
    order = wanted.select(*key, "shard").with_row_index("place")
    parts = []
    for (index,), rows in order.group_by("shard", maintain_order=True):
        path = shards.shard_path(folder, int(str(index)))
        found = rows.join(shards.read_parquet(path, [*key, *columns]), on=list(key), how="inner")
        if found.height != rows.height:
            raise UserError(f"{path} holds {found.height} of the {rows.height} rows that are wanted from it")
        parts.append(found.select("place", *columns))
    if not parts:
        schema = pq.read_schema(shards.shards(folder)[0].path)
        empty = pa.schema([schema.field(name) for name in columns]).empty_table()
        return pl.DataFrame(pl.from_arrow(empty))
    return pl.concat(parts).sort("place").drop("place")
