"""Worker processes on this machine: each with its own GPUs, its share of the cores, and a number of its own.

A worker that is killed costs its shards in flight: they go to the next worker that asks, and another process takes its
GPUs under a new number, since no engine's seed may come twice. Shards that cost three workers end the stage, and so
does an exception."""

import itertools
import logging
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from croco.errors import UserError
from croco.models.children import end_with
from croco.pipeline.workers import MAX_WORKER_DEATHS, ComputeJob, ShardResult, Stream, WorkerFactory, groups

OPENING = -1  # where a worker without shards is lost
SHUTDOWN_SECONDS = 10.0  # seconds that a worker without work has to end by itself

logger = logging.getLogger(__name__)


@dataclass
class Running:
    """A worker process, the pipe to it, its GPUs, and the shards it is at."""

    process: SpawnProcess
    pipe: Connection
    gpus: Sequence[str]
    shards: list[int] = field(default_factory=list)
    facts: dict[str, Any] | None = None  # once it is open; a server's counts grow


def processes(job: ComputeJob, shares: Sequence[Sequence[str]]) -> Stream:
    """Yield every shard of the job once, from one process per share of GPUs; raises UserError as a worker does."""
    waiting, deaths, numbers = deque(groups(job.todo, len(shares))), Counter[int](), itertools.count()
    running: dict[Connection, Running] = {}
    leaving: list[Running] = []
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, num_cores // len(shares))

    def start(gpus: Sequence[str]) -> None:
        worker = _start(job.open_worker, next(numbers), gpus, cores)
        running[worker.pipe] = worker

    try:
        for gpus in shares[: len(waiting)]:
            start(gpus)
        while running:
            for worker in running.values():
                if worker.process.exitcode is not None:
                    _kill(worker)  # what it started may hold its GPU, and its end of our pipe
            for pipe in wait([*running], timeout=1.0):
                assert isinstance(pipe, Connection)
                worker = running[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, ConnectionResetError):
                    del running[pipe]
                    _on_worker_death(job.title, worker, deaths)
                    if worker.shards:
                        waiting.appendleft(worker.shards)
                    if waiting:
                        start(worker.gpus)
                    continue
                match message:
                    case UserError():
                        raise message
                    case ShardResult():
                        worker.shards.remove(message.index)
                        yield message
                        continue
                    case dict():
                        if worker.facts is None:
                            worker.facts = {}
                            job.opened.append(worker.facts)
                            deaths.pop(OPENING, None)
                        worker.facts.update(message)
                # it is open, or through with its shards
                worker.shards = waiting.popleft() if waiting else []
                if not worker.shards:
                    leaving.append(running.pop(pipe))
                with suppress(BrokenPipeError):  # it has just died, and its pipe's end comes next
                    pipe.send(worker.shards)
        for worker in leaving:
            worker.process.join(SHUTDOWN_SECONDS)
    finally:
        for worker in [*running.values(), *leaving]:
            _kill(worker)
            worker.process.join()


def _on_worker_death(title: str, worker: Running, deaths: Counter[int]) -> None:
    """Take note of a lost worker; raises when it failed by itself, or when its shards have cost too many."""
    worker.process.join()
    _kill(worker)
    code = worker.process.exitcode or 0
    cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    where = f"at shards {worker.shards[0]} to {worker.shards[-1]}" if worker.shards else "while opening"
    if code > 0:
        raise RuntimeError(f"{title}: a worker process failed {where}; its traceback is above")
    blamed = worker.shards or [OPENING]
    deaths.update(blamed)
    if max(deaths[each] for each in blamed) >= MAX_WORKER_DEATHS:
        raise UserError(
            f"{title}: {MAX_WORKER_DEATHS} worker processes were lost {where}, the last to {cause}: expected a machine "
            f"with memory for all of them (see runtime.replicas and runtime.token_budget); what is finished is kept"
        )
    logger.warning("%s: lost a worker process to %s %s, another one takes over", title, cause, where)


def _start(open_worker: WorkerFactory, number: int, gpus: Sequence[str], cores: int) -> Running:
    """A process of its own environment: what CUDA and OpenMP read there, they read when they are loaded."""
    context = multiprocessing.get_context("spawn")
    our_end, their_end = context.Pipe()
    own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))}
    if gpus:
        own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    process = context.Process(
        target=_serve, args=(their_end, open_worker, number), name=f"croco worker {number}"
    )
    with _environment(own):
        process.start()
    their_end.close()  # or its end would not be seen here
    return Running(process, our_end, gpus)


@contextmanager
def _environment(own: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _kill(worker: Running) -> None:
    """SIGKILL to the worker and to what it has started (engines have processes of their own)."""
    assert worker.process.pid  # 0 would be our own group
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.kill()


def _serve(pipe: Connection, open_worker: WorkerFactory, number: int) -> None:
    """A worker process: its facts, then shard by shard what it is asked for, and after each group its facts again."""
    os.setpgid(0, 0)
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    # without its parent a worker's shards are lost, and its GPU would stay in use
    end_with(parent.pid, whole_group=True)
    try:
        worker = open_worker(number)
        pipe.send(dict(worker.facts))
        while indices := pipe.recv():
            for finished in worker.shards(indices, lambda rows: None):
                pipe.send(finished)
            pipe.send(dict(worker.facts))
    except UserError as error:
        pipe.send(error)
