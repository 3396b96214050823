"""Pairs in, an adapter of the policy out (or a model, where all weights are tuned), for anyone who has a model and
pairs.

It can be killed at any moment and called again: it goes on from its last checkpoint, with the loss curve of an
undisturbed run. The result is the checkpoint with the lowest held-out loss. Every process of a `torchrun` may call it.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from croco.config.training import Training
from croco.errors import UserError, notice
from croco.models.lora import continue_lora, trainable
from croco.pipeline.progress import count_of
from croco.stages.train import checkpoints, setup
from croco.stages.train.batches import plan_steps
from croco.stages.train.checkpoints import adopt, samples
from croco.stages.train.choose_rows import choose_rows
from croco.stages.train.distributed import barrier, gathered, rank
from croco.stages.train.early_stopping import Stopped, shortcuts_of
from croco.stages.train.losses import REFERENCE_FREE
from croco.stages.train.memory_plan import agreed, plan
from croco.stages.train.reference import no_reference, weights_digest
from croco.stages.train.trainer import PairTrainer, training_arguments
from croco.storage import files

CHECKED_PAIRS = 4  # pairs of the first step on which shared rows are proven


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
    start: Path | None = None,
    reference: Literal["base", "start"] = "base",
    on_step: Callable[[int, int], None] | None = None,
    instructions: Mapping[str, str] | None = None,
    micro_batch_tokens: int | Literal["auto"] = 8192,
    gradient_checkpointing: bool | Literal["auto"] = False,
    reference_table: bool = True,
    trackers: tuple[str, ...] = (),
    checkpoint_minutes: float | None = None,
    reference_folder: Path | None = None,
) -> TrainResult:
    """Tune `model` in place on preference pairs, with LoRA into `folder/adapter`, or whole into `folder/model`.

    `pairs` has the columns prompt_id, language, messages, chosen, rejected (not for method "sft"), and chosen_ids and
    rejected_ids where they are known. `start` is the adapter to go on from; `reference` is the base, or the policy as
    it starts. `folder` also gets `metrics.jsonl`, a line per step and evaluation, and `scratch` (checkpoints, and the
    reference's log-probabilities unless `reference_folder` keeps them or `reference_table` is off), which the caller
    may remove. A second call goes on where the first was killed. "auto" is what fits in memory. Raises `UserError` for
    settings out of range, when no pair is left or it cannot fit, and (as `Stopped`) when it stopped before any good
    checkpoint."""
    began = time.monotonic()
    _check(settings, start, model.dtype)
    on_line = not reference_table and settings.method == "dpo" and settings.loss not in REFERENCE_FREE
    if on_line and (settings.full or (start and reference == "start")):
        raise UserError(
            "runtime.reference_table = false takes the policy without its adapter as reference: expected true for "
            'training.full, and for reference = "start" with an adapter to start from'
        )
    setup.check_trackers(trackers)
    training, validation, dropped = setup.encode(model, tokenizer, pairs, settings, instructions)
    examples = training + validation
    steps = plan_steps(len(training), settings.batch_pairs, settings.epochs, seed, settings.updates)
    used = sorted({i for step in steps for i in step} | set(range(len(training), len(examples))))
    scratch, metrics_file = folder / "scratch", folder / "metrics.jsonl"
    arguments = training_arguments(
        settings,
        scratch / "checkpoints",
        num_steps=len(steps),
        seed=seed,
        device=model.device,
        evaluate=bool(validation),
        trackers=trackers,
        bfloat16=settings.full and model.dtype == torch.bfloat16,
    )  # from here on the processes know each other
    origin = [weights_digest(model), reference, *(setup.contents(start) if start else ())]
    if rank() == 0:
        setup.prepare_scratch(scratch, origin, settings, seed, examples)
    barrier()
    first = [examples[i] for i in steps[0][:CHECKED_PAIRS]]
    if rank() == 0:
        _warn_of_few(len(training), len(steps), settings)
    unfused = setup.use_fused_kernels(model, first[:1])
    if unfused and model.device.type == "cuda" and rank() == 0:
        notice(f"no fused kernels: {unfused}")
    # what one process finds holds for all, or they would cut a step into different micro-batches
    rows, slower = gathered(choose_rows(model, first))[0]
    plain_rows = slower if rows in ("plain", "single") else None
    if slower and rank() == 0:
        way = "under a mask" if rows == "masked" else "not shared between completions"
        notice(f"prompts are {way}: {slower}")

    here = plan(model, settings, examples, micro_batch_tokens, gradient_checkpointing, rows)
    layout = agreed(gathered(here))

    def logps(of: Any) -> Tensor | None:
        if settings.method == "sft":
            return None
        if on_line or settings.loss in REFERENCE_FREE:
            return no_reference(examples)
        tokens = layout.micro_batch_tokens
        return setup.share_reference(
            of, examples, used, reference_folder or scratch / "reference", rows, tokens
        )

    reference_logps_CN = logps(model) if reference == "base" else None
    policy = _trainable(model, settings, start, seed)
    if reference == "start":
        reference_logps_CN = logps(policy)
    before = samples(policy.parameters())
    if layout.gradient_checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its name to be, which transformers 5.19 lacks
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def follow(metrics: dict[str, Any]) -> None:
        if on_step and metrics["split"] == "train":
            on_step(metrics["step"], len(steps))

    checkpoint = setup.checkpoint_to_go_on_from(scratch / "checkpoints", metrics_file)
    arguments.eval_on_start = bool(validation) and checkpoint is None
    with setup.tensorboard_in(folder / "tensorboard"):
        trainer = PairTrainer(
            policy,
            arguments,
            settings,
            examples=examples,
            reference_logps_CN=reference_logps_CN,
            reference_on_line=on_line,
            steps=steps,
            validation=range(len(training), len(examples)),
            rows=rows,
            micro_batch_tokens=layout.micro_batch_tokens,
            pad_id=tokenizer.pad_token_id or 0,
            metrics_file=metrics_file,
            lines=checkpoints.read_metrics(metrics_file),
            shortcut_aucs={} if settings.method == "sft" else shortcuts_of(pairs),
            checkpoint_minutes=checkpoint_minutes,
            on_metrics=follow,
        )
    stopped = _run(trainer, checkpoint)
    barrier()
    best = checkpoints.best_checkpoint(scratch / "checkpoints", metrics_file)
    if stopped and (best is None or not settings.sentinel.enabled):
        raise Stopped(f"{stopped}; it had no good checkpoint yet to go on with")
    assert best is not None
    target = folder / ("model" if settings.full else "adapter")
    if rank() == 0:
        adopt(best, target, before, tokenizer if settings.full else None)
    barrier()
    return TrainResult(
        adapter=target,
        adapter_step=checkpoints.step_of(best),
        stopped=stopped,
        steps=len(steps),
        pairs=len(training),
        validation_pairs=len(validation),
        tokens=sum(examples[i].num_tokens for step in steps for i in step),
        cut_pairs=sum(example.cut_tokens > 0 for example in examples),
        cut_tokens=sum(example.cut_tokens for example in examples),
        seconds=time.monotonic() - began,
        plain_rows=plain_rows,
        metrics=checkpoints.last_metrics(trainer.lines),
        dropped=dropped,
    )


def _warn_of_few(num_pairs: int, num_steps: int, settings: Training) -> None:
    """Say on the terminal, before training, that there is little to learn from."""
    if num_pairs >= settings.batch_pairs and num_steps > 1:
        return
    notice(
        f"{count_of(num_pairs, 'pair')} to train on, training.batch_pairs = {settings.batch_pairs:,}: "
        f"{count_of(num_steps, 'optimizer step')} in all; more prompts, a smaller batch or more epochs make more"
    )


def _run(trainer: PairTrainer, checkpoint: Path | None) -> str | None:
    """Train to the end, or until the sentinel stops it: then why."""
    try:
        with files.writing(Path(str(trainer.args.output_dir))):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Stopped as stop:
        trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        return str(stop)
    return None


def _check(settings: Training, start: Path | None, dtype: torch.dtype) -> None:
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


def _trainable(model: PreTrainedModel, settings: Training, start: Path | None, seed: int) -> Any:
    """The policy with what is trained of it, and nothing else, open to gradients."""
    if start is not None:
        return continue_lora(model, start, settings.lora)
    # steps of full tuning are so small that they are lost between two bfloat16 numbers
    return trainable(model.float() if settings.full else model, settings, seed)
