"""A toy stage whose workers meet with mishaps: what `test_executor.py` runs in other processes, by its import path."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from croco.errors import UserError
from croco.pipeline.compute import compute
from croco.pipeline.stage import Work
from croco.pipeline.workers import Advance, ShardResult
from croco.storage.schemas import COMPLETIONS, ledger
from toy_stages import completion

NUM_SHARDS = 24
UNLUCKY = 5


def computed(work: Work) -> None:
    """A completion and a dropped one per shard; `settings["mishap"]` is what happens to the worker of `UNLUCKY`."""
    log = work.folder.parent / "log"
    log.mkdir(exist_ok=True)
    worker = partial(ToyWorker, log, work.settings["mishap"])
    compute(work, worker, [2] * NUM_SHARDS, "completion")


class ToyWorker:
    def __init__(self, log: Path, mishap: str, number: int) -> None:
        if mishap == "never opens":
            os.kill(os.getpid(), signal.SIGKILL)
        self.log, self.mishap = log, mishap
        self.facts = {"engine": "toy", "number": number, "threads": os.environ.get("OMP_NUM_THREADS")}

    def shards(self, indices: Sequence[int], advance: Advance) -> Iterator[ShardResult]:
        """In reverse, as an engine that finishes out of order would."""
        for index in reversed(indices):
            with (self.log / f"{index}").open("a") as file:
                file.write(f"{os.getpid()}\n")
            if index == UNLUCKY:
                self.meet()
            advance(2)
            table = pa.Table.from_pylist([completion(str(index))], schema=COMPLETIONS.schema)
            dropped = ledger([("completion", str(index), "en", 1, "odd")])
            yield ShardResult(index, table, dropped, {"completion": 2}, {"tokens": index})

    def meet(self) -> None:
        been = self.log / "been"
        match self.mishap:
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "killed once" if not been.exists():
                been.touch()
                time.sleep(1)  # so that what came before is written
                os.kill(os.getpid(), signal.SIGKILL)
            case "refuses":
                raise UserError("prompt '5' in en: expected something else")
            case "mistake":
                raise ZeroDivisionError("a mistake of ours")
