"""What computes shards: workers, the jobs they are given, and the shards that they give back. Where they run is
`compute.py`."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

MAX_WORKER_DEATHS = 3  # workers that may be lost at the same shards
SHARDS_AT_ONCE = 16  # shards a worker takes in one call: those in flight are what a kill costs
Advance = Callable[[int], None]


@dataclass(frozen=True)
class ShardResult:
    """One computed shard: its table, its ledger, how many units it had to account for, and sums for `stage.json`."""

    index: int
    table: pa.Table
    dropped: pa.Table
    read: Mapping[str, int]
    sums: Mapping[str, int] = field(default_factory=dict)  # tokens and the like, added up over the shards
    written: Mapping[str, int] | None = None  # units that are not counted by the table's rows


class Worker(Protocol):
    """Computes shards of one stage. `facts` are what `stage.json` records of it: engine, device, its own seed."""

    facts: dict[str, Any]

    def shards(self, indices: Sequence[int], advance: Advance) -> Iterator[ShardResult]:
        """Yield each of these shards once, in any order; `advance(n)` says that n rows more are done."""
        ...


# opens a worker for replica number i; must be picklable where workers run in other processes (functools.partial)
WorkerFactory = Callable[[int], Worker]
Stream = Generator[ShardResult, None, None]  # closed by who reads it: then its workers end


@dataclass(frozen=True)
class ComputeJob:
    """What an executor is given; it yields every shard once, and puts the facts of each worker it opens in `opened`."""

    title: str
    folder: Path  # of the stage
    todo: Sequence[int]
    file: Callable[[int], Path]  # the file that says, by being there, that a shard is finished
    open_worker: WorkerFactory
    gpus: int  # that one worker's engine needs
    opened: list[dict[str, Any]] = field(default_factory=list)


def shard_sizes(rows: int, size: int, each: int = 1) -> list[int]:
    """Units in each shard of `size` rows, when a row has `each` of them."""
    return [each * min(size, rows - start) for start in range(0, rows, size)]


def groups(todo: Sequence[int], workers: int) -> list[list[int]]:
    """Shards in the portions that workers take, smaller towards the end so that all of them end together."""
    made: list[list[int]] = []
    start = 0
    while start < len(todo):
        left = len(todo) - start
        fair = left if workers == 1 else -(-left // (2 * workers))
        made.append(list(todo[start : start + min(SHARDS_AT_ONCE, fair)]))
        start += len(made[-1])
    return made
