"""Ray: the same workers as an actor pool of Ray Data, on this machine or on a cluster.

Groups of shard numbers go in; tables and ledgers come out, a row and a block per shard, as Arrow IPC; the driver, which
holds the run's lock, writes them. A worker yields its shards in the order they were asked for: when the group of a lost
actor is computed again, Ray skips as many blocks as it has had, so a block's place must say which shard it is.
What is on disk by then is not computed again. Leaves out clusters that grow on demand and Ray's own checkpoints.
"""

import json
import logging
import os
import secrets
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

import croco
from croco.config.runtime import Runtime
from croco.errors import UserError, one_line
from croco.pipeline.workers import (
    MAX_WORKER_DEATHS,
    ComputeJob,
    ShardResult,
    Stream,
    Worker,
    WorkerFactory,
    groups,
)
from croco.storage.records import read_record

SHARD = pa.schema(
    [
        ("index", pa.int64()),
        ("table", pa.large_binary()),
        ("dropped", pa.large_binary()),
        ("about", pa.string()),  # JSON: read and sums of the shard, facts of its worker
        ("error", pa.string()),  # instead of all the others: a sentence for the user
    ]
)


def actors(job: ComputeJob, runtime: Runtime) -> Stream:
    """Yield every shard of the job once, from `runtime.replicas` actors; raises UserError as a worker does."""
    join(runtime)
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

    opened: dict[str, dict[str, Any]] = {}
    try:
        for batch in dataset(job, runtime).iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        ):
            for row in batch.to_pylist():
                if row["error"] is not None:
                    raise UserError(row["error"])
                if row["table"] is None:  # on disk since before its worker was lost
                    continue
                about = json.loads(row["about"])
                if about["worker"] not in opened:
                    opened[about["worker"]] = {}
                    job.opened.append(opened[about["worker"]])
                opened[about["worker"]].update(about["facts"])  # a server's counts grow
                yield ShardResult(
                    row["index"], _table(row["table"]), _table(row["dropped"]), about["read"], about["sums"]
                )
    except (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
        raise UserError(
            f"{job.title}: {MAX_WORKER_DEATHS} Ray workers were lost at the same shards, the last so: "
            f"{one_line(error)}; what is finished is kept"
        ) from None


def dataset(job: ComputeJob, runtime: Runtime) -> Any:
    """Ray Data's plan: a block per group of shards, and a pool of actors that make a block per shard of it."""
    import ray.data

    workers, gpus = pool(runtime, job.gpus)
    portions = groups(job.todo, workers)
    asked = [{"shards": portion} for portion in portions]
    record = read_record(job.folder)
    memory = runtime.ray.memory_gib_per_worker
    with warnings.catch_warnings():
        # max_restarts and max_task_retries have no other way in, up to Ray 2.63
        warnings.simplefilter("ignore")
        planned = ray.data.from_items(asked, override_num_blocks=len(asked)).map_batches(
            ShardWorker,
            fn_constructor_args=(job.open_worker, job.folder, job.file, record["fingerprint"], os.getcwd()),
            batch_size=1,
            batch_format="pyarrow",
            # one group at a time: a second one would wait at a worker while others have nothing to do
            compute=ray.data.ActorPoolStrategy(
                size=min(workers, len(portions)), max_tasks_in_flight_per_actor=1
            ),
            num_cpus=runtime.ray.cpus_per_worker,
            num_gpus=gpus,
            memory=memory and memory * 2**30,
            max_restarts=-1,
            max_task_retries=MAX_WORKER_DEATHS - 1,
        )
    planned.context.target_max_block_size = 1  # a block per shard, sent when it is there
    planned.context.execution_no_progress_timeout_s = -1  # a shard may take hours
    planned.context.enable_progress_bars = False
    return planned


class ShardWorker:
    """An actor: a worker of ours, opened at its first group, so that Ray counts a worker lost while opening too."""

    def __init__(
        self,
        open_worker: WorkerFactory,
        folder: Path,
        file: Callable[[int], Path],
        fingerprint: str,
        place: str,
    ) -> None:
        self.open_worker, self.folder, self.file = open_worker, folder, file
        self.fingerprint, self.place = fingerprint, place
        self.worker: Worker | None = None

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        import ray

        indices = batch["shards"][0].as_py()
        try:
            if self.worker is None:
                self.check_place()
                self.name = ray.get_runtime_context().get_worker_id()
                # another number for each process, restarted ones too: no engine's seed may come twice
                self.worker = self.open_worker(int(self.name[:8], 16))
            yield from self.rows(self.worker, indices)
        except UserError as error:
            yield pa.Table.from_pylist([{"error": str(error)}], schema=SHARD)

    def check_place(self) -> None:
        """Work where the driver works, and make sure that the run's folder here is the run's folder there."""
        record = self.folder / "stage.json"
        try:
            os.chdir(self.place)
            seen = record.exists() and read_record(self.folder)["fingerprint"] == self.fingerprint
        except (OSError, UserError):
            seen = False
        if not seen:
            raise UserError(
                f"a Ray worker on {os.uname().nodename} does not find {record} in {self.place}: expected the run's "
                f"folder, and this one, on a file system that all nodes share"
            )

    def rows(self, worker: Worker, indices: Sequence[int]) -> Iterator[pa.Table]:
        """A row per shard, in the order of the indices."""
        there = {index for index in indices if self.file(index).exists()}
        made: dict[int, dict[str, Any]] = {index: {"index": index} for index in there}
        order = list(indices)
        for finished in worker.shards([index for index in indices if index not in there], lambda rows: None):
            about = {
                "read": dict(finished.read),
                "sums": dict(finished.sums),
                "facts": worker.facts,
                "worker": self.name,
            }
            made[finished.index] = {
                "index": finished.index,
                "table": _bytes(finished.table),
                "dropped": _bytes(finished.dropped),
                "about": json.dumps(about),
            }
            while order and order[0] in made:
                yield pa.Table.from_pylist([made.pop(order.pop(0))], schema=SHARD)
        for index in order:
            yield pa.Table.from_pylist([made.pop(index)], schema=SHARD)


def join(runtime: Runtime) -> None:
    """Connect this process to the cluster, or start one on this machine's loopback that ends with the process."""
    address = runtime.ray.address
    _settle(address)
    try:
        import ray
        import ray.data
        from ray.exceptions import RayError
    except ModuleNotFoundError as error:
        raise UserError(
            f"runtime.executor = 'ray' needs {error.name}, which is not here: pip install 'croco-tuning[ray]'"
        ) from None
    if ray.is_initialized():
        return
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it logs beyond that, it raises too
    environment: dict[str, Any] = {}
    if runtime.threads is not None:
        environment["env_vars"] = {"OMP_NUM_THREADS": str(runtime.threads)}
    if address is not None:
        environment["py_modules"] = [str(Path(croco.__file__).parent)]  # the nodes run the code that is here
    try:
        if address not in (None, "auto"):  # Ray would look for two minutes
            host, _, port = str(address).rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            runtime_env=environment,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (OSError, RuntimeError, ValueError, RayError) as error:
        if address is None:
            raise
        raise UserError(
            f"runtime.ray.address = '{address}': cannot join a Ray cluster there: {one_line(error)} "
            f"(one with a token wants RAY_AUTH_MODE=token here, too)"
        ) from None


def _settle(address: str | None) -> None:
    """Environment that Ray reads when it is imported; a cluster of our own is on the loopback and has its own token."""
    own = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_BACKEND_LOG_LEVEL": "fatal",
    }
    if address is None:  # else Ray leaves a token in the home directory, and asks every later cluster for it
        own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if address is None or address.startswith(("127.", "localhost")):
        own |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # "0" keeps all its servers on the loopback
    for name, value in own.items():
        os.environ.setdefault(name, value)


def pool(runtime: Runtime, gpus_needed: int) -> tuple[int, float]:
    """How many workers, and how many GPUs for each; raises UserError when the cluster is smaller than that."""
    import ray

    there = ray.cluster_resources()
    gpus = runtime.ray.gpus_per_worker
    if gpus is None:
        gpus = float(gpus_needed) if there.get("GPU") else 0.0
    per_worker = {
        "CPU": runtime.ray.cpus_per_worker,
        "GPU": gpus,
        "memory": (runtime.ray.memory_gib_per_worker or 0) * 2**30,
    }
    room = min(int(there.get(name, 0) // each) for name, each in per_worker.items() if each)
    if runtime.replicas == "auto":
        wanted = max(1, min(room, int(there["GPU"] // gpus) if gpus else len(ray.nodes())))
    else:
        wanted = runtime.replicas
    if wanted > room:
        resources = ", ".join(f"{there.get(name, 0):g} {name}" for name, each in per_worker.items() if each)
        asked = ", ".join(f"{each:g} {name}" for name, each in per_worker.items() if each)
        raise UserError(
            f"runtime.replicas = {runtime.replicas} with {asked} for each: the Ray cluster has {resources}, "
            f"room for {room}"
        )
    return wanted, gpus


def _bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _table(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
