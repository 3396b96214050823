"""The texts of completions by row, a few shards at a time: whatever needs text asks here, and little is held.

A shard is read once for the guards and kept for a while, because its pools are mostly decided while it is still there;
what is asked for later is read again. Reading ahead runs in threads (decompression leaves the interpreter alone).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from croco.errors import UserError
from croco.stages.pair.guards import Guards, Traits, traits
from croco.stages.pair.load_scores import Shards, read_arrow
from croco.storage.schemas import COMPLETIONS

COLUMNS = (
    "language",
    "completion",
    "completion_ids",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
)
PICKED = ("completion", "completion_ids", "finish_reason")
Rows = NDArray[np.int64]
Loaded = tuple[pa.Table, Traits]


@dataclass
class Texts:
    """The completions of a table's shards; at most `held` shards of them in memory, with `threads` reading ahead."""

    shards: Shards
    guards: Guards
    among: Sequence[str]  # the languages that a text may be in
    held: int = 8
    threads: int = 2
    _loaded: OrderedDict[int, Future[Loaded]] = field(default_factory=OrderedDict)
    _traits: dict[int, Traits] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.threads)

    def shards_of(self, rows: Rows) -> list[int]:
        """The shards that hold the rows, in order."""
        found = np.searchsorted(self.shards.edges, rows, side="right") - 1
        return [int(index) for index in np.unique(found)]

    def read_ahead(self, rows: Rows) -> None:
        """Begin to read the shards that hold the rows, as far as they find room."""
        for index in self.shards_of(rows)[: self.held]:
            if index not in self._traits:
                self._load(index)

    def traits(self, rows: Rows) -> Traits:
        """The traits of the rows, in their order."""
        order = np.argsort(rows, kind="stable")
        parts = []
        for index in self.shards_of(rows) or [0]:  # no rows have traits too: columns without values
            if index not in self._traits:
                self._traits[index] = self._load(index).result()[1]
            low, high = self.shards.edges[index], self.shards.edges[index + 1]
            mine = rows[order[slice(*np.searchsorted(rows[order], [low, high]))]]
            parts.append(self._traits[index].take(mine - low))
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        return Traits.joined(parts).take(back)

    def forget(self) -> None:
        """Let go of all traits: the pools they were read for are decided."""
        self._traits.clear()

    def take(self, rows: Rows, columns: Sequence[str] = PICKED) -> pa.Table:
        """The columns of the rows, in their order; a row may be asked for more than once."""
        if not len(rows):
            schema = COMPLETIONS.schema
            return pa.schema([(name, schema.field(name).type) for name in columns]).empty_table()
        order = np.argsort(rows, kind="stable")
        parts = []
        for index in self.shards_of(rows):
            low, high = self.shards.edges[index], self.shards.edges[index + 1]
            mine = rows[order[slice(*np.searchsorted(rows[order], [low, high]))]]
            parts.append(self._load(index).result()[0].select(list(columns)).take(mine - low))
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        return pa.concat_tables(parts).take(back)

    def completions(self, rows: Rows) -> pl.Series:
        """The texts of the rows."""
        return pl.DataFrame(pl.from_arrow(self.take(rows, ["completion"])))["completion"]

    def _load(self, index: int) -> Future[Loaded]:
        if index not in self._loaded:
            self._loaded[index] = self._pool.submit(self._read, index)
            while len(self._loaded) > self.held:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(index)
        return self._loaded[index]

    def _read(self, index: int) -> Loaded:
        path = self.shards.paths[index]
        table = read_arrow(path, COLUMNS)
        expected = int(self.shards.edges[index + 1] - self.shards.edges[index])
        if table.num_rows != expected:
            raise UserError(
                f"{path} holds {table.num_rows} rows, expected {expected}: it changed while it was read"
            )
        return table, traits(table, self.guards, self.among)
