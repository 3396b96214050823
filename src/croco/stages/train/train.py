"""Pairs in, an adapter of the policy out (or a model, where all weights are tuned), for anyone who has a model and
pairs.

It can be killed at any moment and called again: it goes on from its last checkpoint, with the loss curve of an
undisturbed run. The result is the checkpoint with the lowest held-out loss. Every process of a `torchrun` may call it.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import polars as pl
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from croco.config.runtime import Runtime
from croco.config.training import Training
from croco.errors import UserError, notice
from croco.models.lora import continue_lora, trainable
from croco.pipeline.progress import count_of
from croco.stages.train import checkpoints, setup
from croco.stages.train.checkpoints import adopt, samples
from croco.stages.train.distributed import barrier, rank
from croco.stages.train.early_stopping import Stopped
from croco.stages.train.losses import REFERENCE_FREE
from croco.stages.train.reference import weights_digest
from croco.stages.train.trainer import PairTrainer, training_arguments
from croco.storage import files

USUAL = Runtime()


@dataclass(frozen=True)
class TrainResult:
    """`adapter` is its folder (or the model's) and `adapter_step` its step; `stopped` says why the sentinel stopped it,
    `plain_rows` why prompts were not shared, each or None; `metrics` are the last ones per split."""

    adapter: Path
    adapter_step: int
    stopped: str | None
    steps: int
    pairs: int
    validation_pairs: int
    tokens: int
    cut_pairs: int
    cut_tokens: int
    seconds: float
    plain_rows: str | None
    metrics: dict[str, dict[str, float]]
    dropped: pl.DataFrame


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Gradients of pairs that are told apart already are denormal, and a processor is several times slower on those.
    Only as long as it is wanted: it changes what other libraries compute in this thread. Threads that torch has already
    are left as they are."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@denormals_as_zero()
def train_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: pl.DataFrame,
    *,
    settings: Training,
    folder: Path,
    seed: int,
    runtime: Runtime = USUAL,
    start: Path | None = None,
    reference: Literal["base", "start"] = "base",
    reference_folder: Path | None = None,
    instructions: Mapping[str, str] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Tune `model` in place on preference pairs, with LoRA into `folder/adapter`, or whole into `folder/model`.

    `pairs` has the columns prompt_id, language, messages, chosen, rejected (not for method "sft"), and chosen_ids and
    rejected_ids where they are known. `start` is the adapter to go on from; `reference` is the base, or the policy as
    it starts. `folder` also gets `metrics.jsonl`, a line per step and evaluation, and `scratch` (checkpoints, and the
    reference's log-probabilities unless `reference_folder` keeps them), which the caller may remove. A second call goes
    on where the first was killed. Raises `UserError` for settings out of range, when no pair is left or it cannot fit,
    and (as `Stopped`) when it stopped before any good checkpoint."""
    began, scratch, metrics_file = time.monotonic(), folder / "scratch", folder / "metrics.jsonl"
    _check(settings, runtime, start, reference, model.dtype)
    data = setup.encode(model, tokenizer, pairs, settings, instructions or {}, seed)
    arguments = training_arguments(
        settings, scratch / "checkpoints", num_steps=len(data.steps), seed=seed, device=model.device,
        evaluate=bool(data.held_out), trackers=runtime.trackers,
        bfloat16=settings.full and model.dtype == torch.bfloat16,
    )  # fmt: skip
    # from here on the processes know each other
    origin = [weights_digest(model), reference, *(setup.contents(start) if start else ())]
    setup.prepare_scratch(scratch, origin, settings, seed, data.examples)
    _warn_of_few(data.num_training, len(data.steps), settings)
    layout = setup.lay_out(model, settings, runtime, data)

    table = None if _on_line(settings, runtime) else reference_folder or scratch / "reference"
    logps = partial(setup.share_reference, data, layout, settings, table)
    of_base = logps(model) if reference == "base" else None
    policy = _trainable(model, settings, start, seed)
    reference_logps_CN = of_base if reference == "base" else logps(policy)
    if layout.gradient_checkpointing:
        setup.compute_activations_twice(model)
    checkpoint = setup.checkpoint_to_go_on_from(scratch / "checkpoints", metrics_file)
    arguments.eval_on_start = bool(data.held_out) and checkpoint is None
    with setup.tensorboard_in(folder / "tensorboard"):
        trainer = PairTrainer(
            policy, arguments, settings, data, layout, reference_logps_CN, reference_on_line=table is None,
            pad_id=tokenizer.pad_token_id or 0, metrics_file=metrics_file, on_step=on_step,
            lines=checkpoints.read_metrics(metrics_file), checkpoint_minutes=runtime.checkpoint_minutes,
        )  # fmt: skip
    target = folder / ("model" if settings.full else "adapter")
    step, stopped = _tune(trainer, checkpoint, target, tokenizer if settings.full else None)
    return TrainResult(
        target, step, stopped, seconds=time.monotonic() - began, plain_rows=layout.plain_rows,
        metrics=checkpoints.last_metrics(trainer.lines), dropped=data.dropped, **data.counts(),
    )  # fmt: skip


def _on_line(settings: Training, runtime: Runtime) -> bool:
    """Whether the reference is computed at every step, with the adapter switched off."""
    has_reference = settings.method == "dpo" and settings.loss not in REFERENCE_FREE
    return has_reference and not runtime.reference_table


def _check(
    settings: Training, runtime: Runtime, start: Path | None, reference: str, dtype: torch.dtype
) -> None:
    if settings.batch_pairs < 1 or settings.epochs < 1:
        raise UserError(
            f"training.batch_pairs is {settings.batch_pairs} and training.epochs {settings.epochs}; expected at least 1"
        )
    if settings.full and start is not None:
        raise UserError(f"training.full tunes all weights, expected no adapter to start from, found {start}")
    # a loss scale is found by overflow, which the sentinel cannot tell from a run that breaks
    if settings.full and dtype == torch.float16:
        raise UserError(
            "training.full tunes all weights, whose gradients overflow in the policy's float16: expected policy.dtype "
            "= 'bfloat16' or 'float32', or adapters"
        )
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise UserError("runtime.accelerate_config has mixed_precision = fp16, expected bf16 or no")
    if _on_line(settings, runtime) and (settings.full or (start and reference == "start")):
        raise UserError(
            "runtime.reference_table = false takes the policy without its adapter as reference: expected true for "
            'training.full, and for reference = "start" with an adapter to start from'
        )
    setup.check_trackers(runtime.trackers)


def _warn_of_few(num_pairs: int, num_steps: int, settings: Training) -> None:
    """Say on the terminal, before training, that there is little to learn from."""
    if rank() or (num_pairs >= settings.batch_pairs and num_steps > 1):
        return
    notice(
        f"{count_of(num_pairs, 'pair')} to train on, training.batch_pairs = {settings.batch_pairs:,}: "
        f"{count_of(num_steps, 'optimizer step')} in all; more prompts, a smaller batch or more epochs make more"
    )


def _trainable(model: PreTrainedModel, settings: Training, start: Path | None, seed: int) -> Any:
    """The policy with what is trained of it, and nothing else, open to gradients."""
    if start is not None:
        return continue_lora(model, start, settings.lora)
    # steps of full tuning are so small that they are lost between two bfloat16 numbers
    return trainable(model.float() if settings.full else model, settings, seed)


def _tune(
    trainer: PairTrainer, checkpoint: Path | None, target: Path, tokenizer: Any
) -> tuple[int, str | None]:
    """Train to the end, or until the sentinel stops it, and copy the best checkpoint to `target`; returns its step and
    why training was stopped."""
    folder, stopped = Path(str(trainer.args.output_dir)), None
    before = samples(trainer.model.parameters())
    try:
        with files.writing(folder):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Stopped as stop:
        trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        stopped = str(stop)
    barrier()
    best = checkpoints.best_checkpoint(folder, trainer.metrics_file)
    if stopped and (best is None or not trainer.settings.sentinel.enabled):
        raise Stopped(f"{stopped}; it had no good checkpoint yet to go on with")
    assert best is not None
    if rank() == 0:
        adopt(best, target, before, tokenizer)
    barrier()
    return checkpoints.step_of(best), stopped
