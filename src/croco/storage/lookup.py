"""Rows of sharded tables by key or by number, without holding a table's texts in memory."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from croco.errors import UserError
from croco.storage import shards

Places = NDArray[np.integer]


def locate(
    folder: Path,
    key: Sequence[str],
    columns: Sequence[str] = (),
    reduce: Callable[[pl.DataFrame], pl.DataFrame] | None = None,
) -> pl.DataFrame:
    """The key columns of all finished shards and the number of the shard that holds each row; with `reduce`, what it
    makes of every shard's key and `columns`. Raises UserError for a folder without shards or a file that is no Parquet.
    """
    parts = []
    for shard in shards.shards(folder):
        rows = shards.read_parquet(shard.path, [*key, *columns])
        parts.append((reduce(rows) if reduce else rows).with_columns(shard=pl.lit(shard.index, pl.Int32)))
    if not parts:
        raise UserError(f"{folder} holds no finished shard")
    return pl.concat(parts)


def gather(folder: Path, wanted: pl.DataFrame, key: Sequence[str], columns: Sequence[str]) -> pl.DataFrame:
    """The columns of the wanted rows (key and `shard`), in their order; a row may be wanted more than once. Raises
    UserError when a shard no longer holds a row that it held."""
    order = wanted.select(*key, "shard").with_row_index("place")
    parts = []
    for (index,), rows in order.group_by("shard", maintain_order=True):
        path = shards.shard_path(folder, int(str(index)))
        texts = rows.join(shards.read_parquet(path, [*key, *columns]), on=list(key), how="inner")
        if texts.height != rows.height:
            raise UserError(f"{path} holds {texts.height} of the {rows.height} rows that are wanted from it")
        parts.append(texts.select("place", *columns))
    if not parts:
        return shards.read_parquet(shards.shards(folder)[0].path, columns).clear()
    return pl.concat(parts).sort("place").drop("place")


class ShardRows:
    """Rows of a table by their number in all of its finished shards.

    A shard is read whole (its `columns`, and those that `prepare` makes of them), in threads, and stays in memory until
    `held` others were asked for."""

    def __init__(
        self,
        folder: Path,
        columns: Sequence[str],
        prepare: Callable[[pl.DataFrame], pl.DataFrame],
    ) -> None:
        self._shards = shards.shards(folder)
        self.edges = np.cumsum([0, *(shard.rows for shard in self._shards)])
        self._columns, self._prepare, self.held = list(columns), prepare, 2
        self._read_shards: OrderedDict[int, Future[pa.Table]] = OrderedDict()
        self._pool = ThreadPoolExecutor(2)

    def shards_of(self, places: Places) -> list[int]:
        return np.unique(np.searchsorted(self.edges, places, side="right") - 1).tolist()

    def read_ahead(self, places: Places) -> None:
        """Begin to read the shards that hold the rows, as far as they find room."""
        for index in self.shards_of(places)[: self.held]:
            self._get(index)

    def take(self, places: Places, columns: Sequence[str]) -> pl.DataFrame:
        """The columns of the rows, in their order; a row may be asked for more than once."""
        order = np.argsort(places, kind="stable")
        rising = places[order]
        bounds = np.searchsorted(rising, self.edges)
        parts = []
        for index in np.flatnonzero(np.diff(bounds)).tolist() or [0]:
            rows = rising[bounds[index] : bounds[index + 1]] - self.edges[index]
            parts.append(_take(self._get(index).result().select(list(columns)), rows))
        table = pa.concat_tables(parts)
        if (order[1:] < order[:-1]).any():
            table = _take(table, np.argsort(order))
        return pl.DataFrame(pl.from_arrow(table))

    def _get(self, index: int) -> Future[pa.Table]:
        if index not in self._read_shards:
            self._read_shards[index] = self._pool.submit(self._read, index)
            while len(self._read_shards) > self.held:
                self._read_shards.popitem(last=False)
        self._read_shards.move_to_end(index)
        return self._read_shards[index]

    def _read(self, index: int) -> pa.Table:
        shard = self._shards[index]
        table = shards.read_arrow(shard.path, self._columns)
        if table.num_rows != shard.rows:
            raise UserError(f"{shard.path} holds {table.num_rows} rows, expected {shard.rows}: it changed")
        made = self._prepare(pl.DataFrame(pl.from_arrow(table))).to_arrow()
        for name in made.column_names:
            table = table.append_column(name, made[name])
        return table


def _take(table: pa.Table, rows: Places) -> pa.Table:
    """Copies of some rows, or a view of all of them."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (rows[1:] > rows[:-1]).all():
        return table.slice(rows[0], len(rows))
    # Arrow would load pandas for an array of NumPy
    return table.take(pl.Series(rows, dtype=pl.UInt32).to_arrow())


# Prompts ---------------------------------------------------------------------------------------------------------


def ids_in_part(prompts: Path, part: Sequence[int] | None) -> pl.Series | None:
    """The prompt_ids of part [number, of how many] of a prompts table, sorted; None is all. Dealt out in the
    order of prompt_id, so prompts that belong together by name are spread over all parts, and every stage finds the
    same ones."""
    if part is None:
        return None
    number, count = part
    names = shards.read_table(prompts, ["prompt_id"])["prompt_id"].unique().sort()
    return names.gather_every(count, number - 1)


def read_prompts(
    prompts: Path, languages: Sequence[str] | None, part: Sequence[int] | None, columns: Sequence[str]
) -> pl.DataFrame:
    """The prompts in some languages (None is all) and of a part, in the order of their keys."""
    rows = shards.read_table(prompts, ["prompt_id", "language", *columns])
    if languages is not None:
        rows = rows.filter(pl.col("language").is_in(list(languages)))
    if (names := ids_in_part(prompts, part)) is not None:
        rows = rows.filter(pl.col("prompt_id").is_in(names.implode()))
    return rows.sort("prompt_id", "language")
