"""Checkpoints of a training, the metrics file beside them, and the folder that the best one becomes.

A checkpoint is transformers' folder with a seal, written last, that lists its files and sizes, and that of the metrics
file: without all of them it does not count. The metrics file has a JSON line per step, evaluation and stop; going on
rewrites the lines after the checkpoint."""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import TrainerCallback

from croco.errors import UserError, one_line
from croco.stages.train.distributed import gathered
from croco.stages.train.early_stopping import best_step
from croco.storage.files import sync_files, sync_folder, write_json, write_text, writing

METRICS = "metrics"  # in a seal: bytes of the metrics file, which tells what the checkpoint is worth
SEAL = "complete"  # marker of a checkpoint written to its end: a JSON table of its files and their sizes
KEPT = 2  # newest checkpoints that stay, beside the best one
SAMPLED = 4096  # numbers of each tensor that are compared
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MODEL = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")


def seal(folder: Path, metrics_file: Path) -> None:
    """Mark a checkpoint as whole, and remove the older ones but for the newest and the best."""
    sync_files(folder)
    with metrics_file.open("rb") as metrics:  # its lines up to here will not be written again
        os.fsync(metrics.fileno())
    write_json(folder / SEAL, {**_sizes(folder), METRICS: metrics_file.stat().st_size})
    best = best_step(read_metrics(metrics_file))
    for older in sorted(folder.parent.glob("checkpoint-*"), key=step_of)[:-KEPT]:
        if step_of(older) != best:
            shutil.rmtree(older)


def step_of(checkpoint: Path | None) -> int:
    """The step a checkpoint was written at; -1 without one."""
    return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else -1


def sealed(folder: Path, metrics_file: Path | None = None) -> list[Path]:
    """The checkpoints that are as they were when they had been written to their end, oldest first; with a metrics file,
    those whose lines it still has."""
    there = metrics_file.stat().st_size if metrics_file is not None and metrics_file.is_file() else 0
    known = 2**63 if metrics_file is None else there
    whole = (path.parent for path in folder.glob(f"checkpoint-*/{SEAL}") if _whole(path, known))
    return sorted(whole, key=step_of)


def _whole(marker: Path, metrics_bytes: int) -> bool:
    try:
        sizes = json.loads(marker.read_text(encoding="utf-8"))
        return bool(sizes.pop(METRICS, 0) <= metrics_bytes and sizes == _sizes(marker.parent))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # torn, or of an early version
        return False


def _sizes(folder: Path) -> dict[str, int]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.stat().st_size for name, path in files.items() if name != SEAL}


@contextmanager
def readable(checkpoint: Path | str | None) -> Iterator[None]:
    """Raise UserError where a checkpoint cannot be read: torch reads no pickled code, only tensors."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged pickles raise anything
        raise UserError(
            f"{checkpoint} cannot be read ({type(error).__name__}: {one_line(error)}), expected a checkpoint as "
            "training wrote it: remove this folder to go on from the one before"
        ) from error


def last_checkpoint(folder: Path, metrics_file: Path) -> Path | None:
    """The newest checkpoint that was written to its end; ones that were not are removed."""
    whole = sealed(folder, metrics_file)
    for path in folder.glob("checkpoint-*"):
        if path not in whole:
            shutil.rmtree(path)
    return whole[-1] if whole else None


def best_checkpoint(folder: Path, metrics_file: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss, or the newest where nothing is held out; None if there is none."""
    whole = {step_of(path): path for path in sealed(folder)}
    lines = read_metrics(metrics_file)
    if not any(line["split"] == "validation" for line in lines):
        return whole[max(whole)] if whole else None
    return whole.get(best_step([line for line in lines if line["step"] in whole]) or -1)


def rewind_metrics(path: Path, step: int) -> None:
    """Keep the lines of a metrics file up to a step, which will be written again, and not a torn last line."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError, RecursionError):
            break
    write_text(path, "".join(kept))
    sync_folder(path.parent)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last_metrics(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    last = {line["split"]: line for line in lines if line["split"] in ("train", "validation")}
    return {split: {k: v for k, v in line.items() if k != "split"} for split, line in last.items()}


class ByTheClock(TrainerCallback):
    """A checkpoint every so many minutes, beside those at evaluations: what a kill may cost. Changes no number."""

    def __init__(self, minutes: float) -> None:
        self.seconds, self.last = 60 * minutes, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        due = time.monotonic() - self.last > self.seconds
        if gathered(due)[0]:  # clocks differ, and all processes must save together
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last = time.monotonic()


# From the checkpoint that was chosen to the folder that the pipeline goes on with -------------------------------------


def samples(parameters: Iterable[Tensor]) -> set[bytes]:
    """A digest of a sample of every tensor that is trained: without names, which may be others on disk."""
    return {_digest(parameter.detach()) for parameter in parameters if parameter.requires_grad}


def _digest(tensor: Tensor) -> bytes:
    flat = tensor.flatten()
    sample = flat[:: max(1, flat.numel() // SAMPLED)].float().cpu().numpy()
    return blake2b(repr(tuple(tensor.shape)).encode() + sample.tobytes(), digest_size=16).digest()


def adopt(checkpoint: Path, folder: Path, before: Set[bytes], tokenizer: Any = None) -> None:
    """Copy the weights of a checkpoint to `folder`, with the tokenizer for a whole model. Raises `UserError` when
    training has changed none of them; `before` are samples of what it began with."""
    names = ADAPTER if tokenizer is None else MODEL
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with writing(partial):
        partial.mkdir(parents=True)
        for path in (path for name in names for path in checkpoint.glob(name)):
            shutil.copyfile(path, partial / path.name)
    _check_changed(partial, before)
    if tokenizer is not None:
        with writing(partial):
            tokenizer.save_pretrained(str(partial))
    sync_files(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    sync_folder(folder.parent)


def _check_changed(folder: Path, before: Set[bytes]) -> None:
    left = set(before)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            left -= {_digest(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    if left:
        return
    raise UserError("training changed nothing: every weight is what it was (is the learning rate 0?)")
