"""Where shards are computed, and that each is written once: in this process, or wherever an executor puts its workers.

A worker is opened where it runs (it loads its model there) and turns shard numbers into tables; the process that holds
the run's lock writes them, so a shard is written once whoever computed it. What a shard holds follows from its number
and the data alone, never from the worker, which is why a lost worker costs its shards in flight and nothing else.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from croco.stage import Work

SHARDS_AT_ONCE = 16  # shards a worker takes in one call: those in flight are what a kill costs
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Finished:
    """One computed shard: its table, its ledger, how many units it had to account for, and sums for `stage.json`."""

    index: int
    table: pa.Table
    dropped: pa.Table
    read: Mapping[str, int]
    sums: Mapping[str, int] = field(default_factory=dict)  # tokens and the like, added up over the shards


class Worker(Protocol):
    """Computes shards of one stage. `facts` are what `stage.json` records of it: engine, device, its own seed."""

    facts: dict[str, Any]

    def shards(self, indices: Sequence[int], advance: Advance) -> Iterator[Finished]:
        """Yield each of these shards once, in any order; `advance(n)` says that n rows more are done."""
        ...


# opens a worker for replica number i; must be picklable where workers run in other processes (functools.partial)
OpenWorker = Callable[[int], Worker]


def compute(work: Work, open_worker: OpenWorker, sizes: Sequence[int], unit: str) -> None:
    """Compute and write every shard that is not finished; shard i has `sizes[i]` rows of `unit`."""
    todo = work.todo(len(sizes))
    if not todo:
        return
    done = sum(sizes) - sum(sizes[index] for index in todo)
    began, sums = time.monotonic(), Counter[str]()
    with work.progress(sum(sizes), unit, done) as bar:
        for finished in _here(work, open_worker, todo, bar.advance):
            work.write(finished.index, finished.table, read=finished.read, dropped=finished.dropped)
            sums.update(finished.sums)
    seconds = max(time.monotonic() - began, 1e-9)
    rates = {f"{name}_per_second": round(total / seconds, 1) for name, total in sums.items()}
    work.record(**sums, **rates)


def _here(work: Work, open_worker: OpenWorker, todo: Sequence[int], advance: Advance) -> Iterator[Finished]:
    """One worker in this process."""
    worker = open_worker(0)
    try:
        for start in range(0, len(todo), SHARDS_AT_ONCE):
            yield from worker.shards(todo[start : start + SHARDS_AT_ONCE], advance)
    finally:  # at the end, because a server's counts grow
        work.record(**worker.facts)
