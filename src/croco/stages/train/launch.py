"""A tuning job in this process, or in several that tune one policy together and make what one process makes.

`runtime.train_processes` starts them with torchrun, `runtime.accelerate_config` with `accelerate launch` (FSDP,
DeepSpeed, several machines). The job goes to them as a file and their result comes back as one; they end with this
process. This module is also the program that they run."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from croco.config.models import Policy
from croco.config.runtime import Runtime
from croco.config.training import Training
from croco.errors import UserError, one_line
from croco.models.children import end_with
from croco.models.loading import load_causal, pick_device, pick_dtype, weightless
from croco.models.memory import out_of_memory, weights_bytes
from croco.stages.train.distributed import rank
from croco.stages.train.memory_plan import check_weights
from croco.stages.train.train import TrainResult, train_pairs
from croco.storage import files, shards
from croco.storage.schemas import DROPPED

PARENT = "CROCO_TRAIN_PARENT"  # the process that started this one
POLL_SECONDS = 0.2
LOG_LINES = 40  # of a launch that failed
Advance = Callable[[int, int], None]


class TrainJob(BaseModel):
    """What to tune on what, with which settings: everything `train_pairs` needs, by names and paths."""

    model_config = ConfigDict(frozen=True)

    policy: Policy
    runtime: Runtime
    training: Training
    folder: Path
    pairs: Path  # a finished table of pairs
    title: str
    seed: int
    limit: int | None = None  # of the pairs, the first ones
    start: Path | None = None
    reference: Literal["base", "start"] = "base"
    reference_folder: Path | None = None  # where the reference's values are kept; None keeps none


def tune(job: TrainJob, advance: Advance) -> TrainResult:
    """Run a job on as many processes as the recipe says."""
    runtime = job.runtime
    processes = num_processes(runtime.train_processes, runtime.device)
    if processes == 1 and runtime.accelerate_config is None:
        return tune_here(job, advance)
    return _launch(job, processes, advance)


def num_processes(wanted: int | str, device: str) -> int:
    """`runtime.train_processes` as a number; raises UserError when there are fewer GPUs."""
    picked = pick_device(device)
    gpus = (1 if picked.index is not None else torch.cuda.device_count()) if picked.type == "cuda" else None
    if wanted == "auto":
        return gpus or 1
    if gpus is not None and int(wanted) > gpus:
        raise UserError(
            f"runtime.train_processes = {wanted}, expected at most one per GPU, and there are {gpus}"
        )
    return int(wanted)


def tune_here(job: TrainJob, advance: Advance) -> TrainResult:
    """Run a job in this process, which may be one of several that all do."""
    policy, device = job.policy, pick_device(job.runtime.device)
    quantization = None if job.training.full else policy.quantization
    size = pick_dtype(policy.dtype, device).itemsize
    needed = weights_bytes(weightless(policy, "policy", "causal"), size, quantization)
    check_weights(needed, device, policy.model)  # before any is loaded
    try:
        model, tokenizer = load_causal(policy, None, job.runtime.device, quantization)
        return train_pairs(
            model, tokenizer, shards.read_table(job.pairs)[: job.limit], settings=job.training, folder=job.folder,
            seed=job.seed, runtime=job.runtime, start=job.start, reference=job.reference,
            reference_folder=job.reference_folder, instructions=policy.instruction, on_step=advance,
        )  # fmt: skip
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"{job.title}: memory ran out on {device} ({one_line(error)}): expected no other "
            f"process there, runtime.micro_batch_tokens = 'auto' or fewer, or runtime.gradient_checkpointing = true"
        ) from error


# The process that starts the others ----------------------------------------------------------------------------------


def _launch(job: TrainJob, processes: int, advance: Advance) -> TrainResult:
    place = job.folder / "scratch" / "launch"
    place.mkdir(parents=True, exist_ok=True)
    for name in ("result.json", "error.json"):
        (place / name).unlink(missing_ok=True)
    files.write_text(place / "job.json", job.model_dump_json())
    config, words = job.runtime.accelerate_config, [sys.executable, "-m"]
    if config is not None:
        if not Path(config).is_file():
            raise UserError(f"runtime.accelerate_config = '{config}': no such file")
        words += ["accelerate.commands.launch", "--config_file", config]
        words += ["--num_processes", str(processes)] if processes > 1 else []
    else:
        words += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words += ["-m", "croco.stages.train.launch", str(place)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, PARENT: str(os.getpid())}
    with (place / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            words, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _follow(process, place / "steps", advance)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    if (place / "error.json").is_file():
        raise UserError(files.read_json(place / "error.json")["message"])
    if process.returncode or not (place / "result.json").is_file():
        last = (place / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        raise RuntimeError(
            "\n".join([f"{job.title}: its processes failed (exit code {process.returncode}):", *last])
        )
    result = files.read_json(place / "result.json")
    dropped = shards.read_parquet(place / "dropped.parquet")
    return TrainResult(**{**result, "adapter": Path(result["adapter"]), "dropped": dropped})


def _follow(process: subprocess.Popen[bytes], steps: Path, advance: Advance) -> None:
    steps.unlink(missing_ok=True)
    seen = 0
    while True:
        ended = process.poll() is not None
        if steps.is_file():
            lines = steps.read_text(encoding="utf-8").split("\n")[:-1]
            for line in lines[seen:]:
                step, _, num_steps = line.partition(" ")
                advance(int(step), int(num_steps))
            seen = len(lines)
        if ended:
            return
        time.sleep(POLL_SECONDS)


# The processes that are started --------------------------------------------------------------------------------------


def main(place: Path) -> int:
    """One of several processes: do the job that lies in `place`; rank 0 says how far it is, and what came of it."""
    end_with(int(os.environ[PARENT]))
    job = TrainJob.model_validate_json((place / "job.json").read_text(encoding="utf-8"))
    first = os.environ.get("RANK", "0") == "0"
    if pick_device(job.runtime.device).type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))

    def advance(step: int, num_steps: int) -> None:
        if first:
            with (place / "steps").open("a", encoding="utf-8") as file:
                file.write(f"{step} {num_steps}\n")

    with (place / "lock").open("w") as lock:
        if first:  # those of a start that was killed may take a moment to end
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            result = tune_here(job, advance)
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            files.write_json(place / "error.json", {"message": str(error)})
            return 2
        if rank() == 0:
            shards.write_parquet(
                place / "dropped.parquet", result.dropped.to_arrow().cast(DROPPED.schema), DROPPED.schema
            )
            written = {name: value for name, value in vars(result).items() if name != "dropped"}
            files.write_json(place / "result.json", written | {"adapter": str(result.adapter)})
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
