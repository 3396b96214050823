"""The stage `train`: pairs in, an adapter of the policy out.

`train_pairs` is the same thing with plain arguments, for anyone who has a model and pairs. It can be killed
at any moment and called again: it goes on from its last checkpoint, and the loss curve is that of an
undisturbed run. Left out: choosing when to stop, several devices, full fine-tuning.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import polars as pl
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from croco.engines.loading import load_policy
from croco.errors import UserError
from croco.identity import file_identity
from croco.ops.losses import LOSSES
from croco.progress import Progress
from croco.records import DROPPED
from croco.sampling.chat import end_id
from croco.stage import Work
from croco.store import read_table, write_text
from croco.training.batches import plan_steps
from croco.training.encode import Example, encode_pairs, held_out
from croco.training.forward import shared_rows_differ
from croco.training.lora import apply_lora, continue_lora, save_adapter
from croco.training.reference import reference_logps, weights_digest
from croco.training.settings import TrainSettings
from croco.training.trainer import (
    PairTrainer,
    last_checkpoint,
    last_metrics,
    rewind_metrics,
    training_arguments,
)

CHECKED_PAIRS = 4  # pairs of the first step on which shared rows are proven


@dataclass(frozen=True)
class TrainResult:
    """What a run did. `plain_rows` says why prompts were not shared, or is None; `metrics` are the last ones
    per split.
    """

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
    start: Path | None = None,
    reference: Literal["base", "start"] = "base",
    on_step: Callable[[int, int], None] | None = None,
    instructions: Mapping[str, str] | None = None,
    micro_batch_tokens: int = 8192,
    gradient_checkpointing: bool = False,
) -> TrainResult:
    """Tune `model` in place with LoRA on preference pairs; the adapter is written to `folder/adapter`.

    `pairs` has the columns prompt_id, language, messages, chosen, rejected (with chosen_ids and rejected_ids
    where the sampled ids are known); method "sft" needs no rejected. `start` is the adapter that tuning goes on
    from, and `reference` what the policy is held against: the base, or the policy as it starts. Also written:
    `folder/metrics.jsonl`, one line per step and evaluation, and `folder/scratch` (checkpoints, reference
    log-probabilities), which the caller may remove afterwards. A second call with the same arguments goes on
    where the first was killed. `on_step(step, num_steps)` follows it. Raises `UserError` for settings out of
    range, when no pair is left, or when the loss is no longer a number.
    """
    began = time.monotonic()
    _check(settings)
    training, validation, dropped = _encode(model, tokenizer, pairs, settings, instructions)
    examples = training + validation
    origin = [weights_digest(model), reference, *(_contents(start) if start else ())]
    scratch = _scratch(folder, origin, settings, seed, examples)

    steps = plan_steps(len(training), settings.batch_pairs, settings.epochs, seed)
    plain_rows = shared_rows_differ(model, [examples[i] for i in steps[0][:CHECKED_PAIRS]], model.device)
    if plain_rows:
        Console(stderr=True).print(f"prompts are not shared between completions: {plain_rows}", markup=False)
    adapted: Any = None
    if start is not None and reference == "start":
        adapted = continue_lora(model, start, settings.lora)
    reference_logps_CN = None
    if settings.method != "sft":
        reference_logps_CN = reference_logps(
            adapted or model,
            examples,
            folder=scratch / "reference",
            shared=plain_rows is None,
            micro_batch_tokens=micro_batch_tokens,
        )

    def follow(metrics: dict[str, Any]) -> None:
        if on_step and metrics["split"] == "train":
            on_step(metrics["step"], len(steps))

    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if adapted is None:
        adapted = (
            continue_lora(model, start, settings.lora) if start else apply_lora(model, settings.lora, seed)
        )
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
        reference_logps_CN=reference_logps_CN,
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
        seconds=time.monotonic() - began,
        plain_rows=plain_rows,
        metrics=last_metrics(folder / "metrics.jsonl"),
        dropped=dropped,
    )


def train(work: Work) -> None:
    """The stage: an arm's pairs into `adapter/` and `metrics.jsonl`; pairs left out go to the ledger."""
    policy, section = work.recipe.policy, TrainSettings.of(work.settings["training"])
    model, tokenizer = load_policy(
        policy.model,
        policy.revision,
        dtype=policy.dtype,
        device=work.runtime.device,
        chat_template=Path(policy.chat_template) if policy.chat_template else None,
        trust_remote_code=policy.trust_remote_code,
    )
    pairs = read_table(work.inputs["pair"])
    with ExitStack() as stack:
        bars: list[Progress] = []

        def advance(step: int, num_steps: int) -> None:
            if not bars:
                bars.append(stack.enter_context(work.progress(num_steps, "step", done=step - 1)))
            bars[0].advance()

        result = train_pairs(
            model,
            tokenizer,
            pairs,
            settings=section,
            folder=work.folder,
            seed=work.seed,
            start=work.inputs["train"] / "adapter" if "train" in work.inputs else None,
            reference=work.settings.get("reference", "base"),
            on_step=advance,
            instructions=policy.instruction,
            micro_batch_tokens=work.runtime.micro_batch_tokens,
            gradient_checkpointing=work.runtime.gradient_checkpointing,
        )
    work.account(
        read={"pair": len(pairs)},
        written={"pair": result.pairs + result.validation_pairs},
        dropped=result.dropped.to_arrow().cast(DROPPED.schema),
    )
    work.record(
        steps=result.steps,
        pairs=result.pairs,
        validation_pairs=result.validation_pairs,
        tokens=result.tokens,
        seconds=round(result.seconds, 1),
        plain_rows=result.plain_rows,
        metrics=result.metrics,
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


def _encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: pl.DataFrame,
    settings: TrainSettings,
    instructions: Mapping[str, str] | None,
) -> tuple[list[Example], list[Example], pl.DataFrame]:
    """Examples to train on, examples held out, and the ledger of what was left out."""
    examples, dropped = encode_pairs(
        pairs,
        tokenizer,
        end=end_id(tokenizer, model.generation_config),
        max_tokens=settings.max_tokens,
        chosen_only=settings.method == "sft",
        instructions=instructions,
    )
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        parts[held_out(example.prompt_id, settings.validation_fraction)].append(example)
    training, validation = parts
    if not training:
        raise UserError(
            f"no pair to train on: of {len(pairs)} pairs {len(dropped)} were left out"
            f"{_first(dropped)} and {len(validation)} are held out for validation"
        )
    return training, validation, dropped


def _first(dropped: pl.DataFrame) -> str:
    if dropped.is_empty():
        return ""
    row = dropped.row(0, named=True)
    return f" (the first, {row['prompt_id']} in {row['language']}, because {row['reason']})"


def _contents(folder: Path) -> list[str]:
    """What the files of an adapter are, by name and content."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, expected an adapter to start from")
    return [f"{path.name} {file_identity(str(path))}" for path in sorted(folder.iterdir()) if path.is_file()]


def _scratch(
    folder: Path, origin: list[str], settings: TrainSettings, seed: int, examples: list[Example]
) -> Path:
    """The folder of checkpoints and reference values, emptied of checkpoints that another run left there."""
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    run = blake2b(json.dumps([origin, asdict(settings), seed]).encode(), digest_size=16)
    for example in examples:
        run.update(repr((example.prompt, example.completions)).encode())
    key = scratch / "run.txt"
    if not key.is_file() or key.read_text(encoding="utf-8") != run.hexdigest():
        shutil.rmtree(scratch / "checkpoints", ignore_errors=True)
        write_text(key, run.hexdigest())
    return scratch
