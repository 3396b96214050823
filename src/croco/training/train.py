"""The stage `train`: pairs in, an adapter of the policy out.

`train_pairs` is the same thing with plain arguments, for anyone who has a model and pairs. It can be killed at any moment
and called again: it goes on from its last checkpoint, and the loss curve is that of an undisturbed run.
Left out: choosing when to stop, several devices, full fine-tuning.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from croco.errors import UserError
from croco.ops.losses import LOSSES
from croco.sampling.chat import end_id
from croco.store import write_text
from croco.training.batches import plan_steps
from croco.training.encode import Example, encode_pairs, held_out
from croco.training.forward import shared_rows_differ
from croco.training.lora import apply_lora, save_adapter
from croco.training.reference import reference_logps, weights_digest
from croco.training.settings import TrainSettings
from croco.training.trainer import PairTrainer, last_checkpoint, rewind_metrics, training_arguments

CHECKED_PAIRS = 4  # pairs of the first step on which shared rows are proven


@dataclass(frozen=True)
class TrainResult:
    """What a run did. `plain_rows` says why prompts were not shared, or is None; `metrics` are the last ones per split."""

    adapter: Path
    steps: int
    pairs: int
    validation_pairs: int
    tokens: int
    seconds: float
    plain_rows: str | None
    metrics: dict[str, dict[str, float]]
    dropped: pl.DataFrame


def train_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: pl.DataFrame,
    *,
    settings: TrainSettings,
    folder: Path,
    seed: int,
    on_step: Callable[[int, int], None] | None = None,
    instructions: Mapping[str, str] | None = None,
    micro_batch_tokens: int = 8192,
    gradient_checkpointing: bool = False,
) -> TrainResult:
    """Tune `model` in place with LoRA on preference pairs; the adapter is written to `folder/adapter`.

    `pairs` has the columns prompt_id, language, messages, chosen, rejected (with chosen_ids and rejected_ids where the
    sampled ids are known); method "sft" needs no rejected. Also written: `folder/metrics.jsonl`, one line per step and
    evaluation, and `folder/scratch` (checkpoints, reference log-probabilities), which the caller may remove afterwards.
    A second call with the same arguments goes on where the first was killed. `on_step(step, num_steps)` follows it.
    Raises `UserError` for settings out of range, when no pair is left, or when the loss is no longer a number.
    """
    start = time.monotonic()
    _check(settings)
    sft = settings.method == "sft"
    examples, dropped = encode_pairs(
        pairs,
        tokenizer,
        end=end_id(tokenizer, model.generation_config),
        max_tokens=settings.max_tokens,
        chosen_only=sft,
        instructions=instructions,
    )
    training, validation = _split(examples, settings.validation_fraction)
    if not training:
        raise UserError(
            f"no pair to train on: of {len(pairs)} pairs {len(dropped)} were left out"
            f"{_most_common(dropped)} and {len(validation)} are held out for validation"
        )
    examples = training + validation
    scratch = _scratch(folder, weights_digest(model), settings, seed, examples)

    steps = plan_steps(len(training), settings.batch_pairs, settings.epochs, seed)
    plain_rows = shared_rows_differ(model, [examples[i] for i in steps[0][:CHECKED_PAIRS]], model.device)
    if plain_rows:
        Console(stderr=True).print(f"prompts are not shared between completions: {plain_rows}", markup=False)
    reference = None
    if not sft:
        reference = reference_logps(
            model,
            examples,
            folder=scratch / "reference",
            shared=plain_rows is None,
            micro_batch_tokens=micro_batch_tokens,
        )

    last: dict[str, dict[str, float]] = {}

    def follow(metrics: dict[str, Any]) -> None:
        last[metrics["split"]] = {name: value for name, value in metrics.items() if name != "split"}
        if on_step and metrics["split"] == "train":
            on_step(metrics["step"], len(steps))

    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted = apply_lora(model, settings.lora, seed)
    trainer = PairTrainer(
        adapted,
        training_arguments(
            settings,
            scratch / "checkpoints",
            num_steps=len(steps),
            seed=seed,
            cpu=model.device.type == "cpu",
            evaluate=bool(validation),
        ),
        settings,
        examples=examples,
        reference_logps_CN=reference,
        steps=steps,
        validation=range(len(training), len(examples)),
        shared=plain_rows is None,
        micro_batch_tokens=micro_batch_tokens,
        pad_id=tokenizer.pad_token_id or 0,
        metrics_file=folder / "metrics.jsonl",
        on_metrics=follow,
    )
    checkpoint = last_checkpoint(scratch / "checkpoints")
    rewind_metrics(folder / "metrics.jsonl", int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    save_adapter(adapted, folder / "adapter")
    return TrainResult(
        adapter=folder / "adapter",
        steps=len(steps),
        pairs=len(training),
        validation_pairs=len(validation),
        tokens=sum(examples[i].num_tokens for step in steps for i in step),
        seconds=time.monotonic() - start,
        plain_rows=plain_rows,
        metrics=last,
        dropped=dropped,
    )


def _check(settings: TrainSettings) -> None:
    if settings.method not in ("dpo", "sft"):
        raise UserError(f"training.method is {settings.method!r}; expected 'dpo' or 'sft'")
    if settings.loss not in LOSSES:
        raise UserError(f"training.loss is {settings.loss!r}; expected one of {', '.join(LOSSES)}")
    if settings.batch_pairs < 1 or settings.epochs < 1:
        raise UserError(
            f"training.batch_pairs is {settings.batch_pairs} and training.epochs {settings.epochs}; expected at least 1"
        )


def _split(examples: list[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        parts[held_out(example.prompt_id, fraction)].append(example)
    return parts


def _most_common(dropped: pl.DataFrame) -> str:
    if dropped.is_empty():
        return ""
    reason, count = dropped["reason"].value_counts(sort=True).row(0)
    return f" ({count} because {reason})"


def _scratch(folder: Path, base: str, settings: TrainSettings, seed: int, examples: list[Example]) -> Path:
    """The folder of checkpoints and reference values, emptied of checkpoints that another run left there."""
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    run = blake2b(json.dumps([base, asdict(settings), seed]).encode(), digest_size=16)
    for example in examples:
        run.update(repr((example.prompt, example.completions)).encode())
    key = scratch / "run.txt"
    if not key.is_file() or key.read_text(encoding="utf-8") != run.hexdigest():
        shutil.rmtree(scratch / "checkpoints", ignore_errors=True)
        write_text(key, run.hexdigest())
    return scratch
