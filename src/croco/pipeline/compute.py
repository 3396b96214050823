"""Where shards are computed: in this process, in several (`processes.py`), or on a Ray cluster (`ray.py`).

A worker is opened where it runs (it loads its model there) and turns shard numbers into tables; the process that holds
the run's lock writes them. What a shard holds follows from its number and the data alone, so a lost worker costs its
shards in flight and nothing else."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from croco.config.runtime import Runtime
from croco.errors import UserError
from croco.models import open
from croco.pipeline.stage import Work
from croco.pipeline.workers import Advance, ComputeJob, Stream, WorkerFactory, groups
from croco.storage import shards as store


def compute(
    work: Work,
    open_worker: WorkerFactory,
    sizes: Sequence[int],
    unit: str,
    *,
    role: str | None = None,
    under: str | None = None,
    drafts: Callable[[int], Path] | None = None,
    here: bool = False,
    gpus: int | None = None,
) -> None:
    """Compute and write every shard that is not finished; shard i has `sizes[i]` rows of `unit`.

    `role` is the workers' key in `[runtime.engines]`, if it is not the stage's name; `under`, where their facts are
    recorded. `drafts` (picklable) names a file per shard, for tables that are a step on the way to the stage's own.
    `here` is for work that is done sooner than other processes have started. `gpus` are those that one worker needs,
    where no role says."""
    file = drafts or partial(store.marker_path, work.folder)
    todo = [index for index in work.todo(len(sizes)) if not file(index).exists()]
    if not todo:
        return
    role = role or work.title.partition("/")[0]
    alone = work.runtime.model_copy(update={"executor": "local", "replicas": 1})
    runtime = alone if here else work.runtime
    needs = gpus_per_worker(runtime, role) if gpus is None else gpus
    job = ComputeJob(work.title, work.folder, todo, file, open_worker, needs)
    done = sum(sizes) - sum(sizes[index] for index in todo)
    began, sums = time.monotonic(), Counter[str]()
    try:
        with (
            work.progress(sum(sizes), unit, done) as bar,
            closing(_stream(job, runtime, sizes, bar.advance)) as stream,
        ):
            for finished in stream:
                if drafts is None:
                    work.write(
                        finished.index,
                        finished.table,
                        read=finished.read,
                        written=finished.written,
                        dropped=finished.dropped,
                    )
                else:
                    store.write_parquet(drafts(finished.index), finished.table, finished.table.schema)
                sums.update(finished.sums)
    finally:  # what a stage that stops has cost is part of its account
        seconds = max(time.monotonic() - began, 1e-9)
        rates = {f"{name}_per_second": round(total / seconds, 1) for name, total in sums.items()}
        facts = {"executor": runtime.executor, **_in_common(job.opened), **sums, **rates}
        work.record(**(facts if under is None else {under: facts}))


def _stream(job: ComputeJob, runtime: Runtime, sizes: Sequence[int], advance: Advance) -> Stream:
    """The shards as they finish, wherever they are computed; other processes' progress is counted in shards."""
    if runtime.executor == "ray":
        from croco.pipeline.ray import actors

        elsewhere = actors(job, runtime)
    else:
        shares = gpu_shares(runtime, job.gpus)[: len(job.todo)]
        if len(shares) == 1:
            yield from _here(job, advance)
            return
        from croco.pipeline.processes import processes

        elsewhere = processes(job, shares)
    with closing(elsewhere):
        for finished in elsewhere:
            advance(sizes[finished.index])
            yield finished


def _here(job: ComputeJob, advance: Advance) -> Stream:
    worker = job.open_worker(0)
    try:
        for group in groups(job.todo, 1):
            yield from worker.shards(group, advance)
    finally:  # at the end, because a server's counts grow
        job.opened.append(worker.facts)
        del worker
        open.release()


def _in_common(opened: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Facts of workers: one value where they agree, else a list of each worker's, in the order they opened."""
    facts: dict[str, Any] = {"workers": len(opened)}
    for name in dict.fromkeys(name for each in opened for name in each):
        values = [each.get(name) for each in opened]
        facts[name] = values[0] if all(value == values[0] for value in values) else values
    return facts


# How many workers, and what each has to itself ----------------------------------------------------------------------


def gpus_per_worker(runtime: Runtime, role: str) -> int:
    """GPUs that one engine of a role needs, where there are GPUs."""
    engine, _ = open.engine_of(runtime, role)
    if runtime.device == "cpu" or engine == "server":
        return 0
    return runtime.vllm.of(role).tensor_parallel if engine == "vllm" else 1


def gpu_shares(runtime: Runtime, gpus: int) -> list[list[str]]:
    """The GPUs of each worker of this machine, by CUDA's names; empty lists where there are none. Raises UserError when
    there are too few for the workers asked for."""
    if runtime.replicas == 1:
        return [[]]
    visible = visible_gpus() if gpus else []
    shares = [visible[i : i + gpus] for i in range(0, len(visible) - gpus + 1, gpus)] if visible else []
    wanted = max(1, len(shares)) if runtime.replicas == "auto" else runtime.replicas
    if not visible:
        return [[] for _ in range(wanted)]
    if wanted > len(shares):
        raise UserError(
            f"runtime.replicas = {runtime.replicas} with {gpus} GPUs a worker: found {len(visible)} GPUs, "
            f"expected {wanted * gpus}"
        )
    return shares[:wanted]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(index) for index in range(count)]


def described(runtime: Runtime) -> str:
    """The executor in a few words, for `croco plan` and `croco doctor`."""
    many = "a worker for every GPU" if runtime.replicas == "auto" else f"{runtime.replicas} workers"
    if runtime.executor == "local":
        return "this process" if runtime.replicas == 1 else f"{many} on this machine, each a process"
    try:
        ray = f"Ray {version('ray')}"
    except PackageNotFoundError:
        ray = "Ray, which is not installed (pip install 'croco-tuning[ray]')"
    address = runtime.ray.address
    return f"{ray}, {many} on {'this machine' if address is None else f'the cluster at {address}'}"


def examined(runtime: Runtime) -> Iterator[str]:
    """The executor against the GPUs of this machine; raises UserError when they are too few."""
    yield described(runtime)
    if runtime.executor == "local" and runtime.device != "cpu":
        for role in ("sample", "score", "evaluate"):
            gpu_shares(runtime, gpus_per_worker(runtime, role))
        if runtime.replicas == 1 and (count := len(visible_gpus())) > gpus_per_worker(runtime, "sample"):
            yield f"  {count} GPUs are here: runtime.replicas = 'auto' gives each a worker"
