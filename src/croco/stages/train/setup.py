"""What a tuning run needs before its first step: examples, its folder, the reference, the last checkpoint."""

import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import INTEGRATION_TO_CALLBACK

from croco.config.runtime import Runtime
from croco.config.training import Training
from croco.errors import UserError, notice, one_line
from croco.models.chat_template import end_id
from croco.models.model_files import context_of
from croco.stages.train import checkpoints
from croco.stages.train.batches import Layout, TrainingData, collate, plan_steps
from croco.stages.train.choose_rows import choose_rows
from croco.stages.train.distributed import barrier, gathered, rank, world
from croco.stages.train.early_stopping import shortcuts_of
from croco.stages.train.encode import Example, encode_pairs, held_out
from croco.stages.train.forward import completion_logps
from croco.stages.train.losses import REFERENCE_FREE
from croco.stages.train.memory_plan import agreed, plan
from croco.stages.train.reference import no_reference, reference_logps
from croco.storage import shards
from croco.storage.files import write_text, writing
from croco.storage.hashing import file_identity

# part of a reason in the ledger, and the settings that decide it
SETTINGS_OF = {
    "cut at the token limit": "sampling.max_new_tokens, or guards.cut",
    "too long to train on": "training.max_tokens, or guards.too_long",
    "more than max_tokens": "training.max_tokens",
    "wrong language": "policy.instruction, or guards.wrong_language",
    "duplicate": "sampling.temperature, or guards.duplicate and guards.near_duplicate",
    "no candidate scores below": "sampling.completions",
    "only one candidate": "sampling.completions",
    "gold completion": "prompts.columns.reference, or chosen",
    "score gap": "guards.min_score_gap",
}
CHECKED_PAIRS = 4  # pairs of the first step on which shared rows are proven
LEAST_LIGER = "liger-kernel>=0.6"  # as the extra gpu has it
LIGER = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # kernels that stay off


def lay_out(model: PreTrainedModel, settings: Training, runtime: Runtime, data: TrainingData) -> Layout:
    """The quickest exact way for these pairs on this machine, the same in every process; says what is slower."""
    first = [data.examples[i] for i in data.steps[0][:CHECKED_PAIRS]]
    unfused = use_fused_kernels(model, first[:1])
    if unfused and model.device.type == "cuda" and rank() == 0:
        notice(f"no fused kernels: {unfused}")
    # what one process finds holds for all, or they would cut a step into different micro-batches
    rows, slower = gathered(choose_rows(model, first))[0]
    if slower and rank() == 0:
        way = "under a mask" if rows == "masked" else "not shared between completions"
        notice(f"prompts are {way}: {slower}")
    asked = runtime.micro_batch_tokens, runtime.gradient_checkpointing
    fits = agreed(gathered(plan(model, settings, data.examples, *asked, rows)))
    plain_rows = slower if rows in ("plain", "single") else None
    return Layout(rows, fits.micro_batch_tokens, fits.gradient_checkpointing, plain_rows)


def share_reference(
    data: TrainingData, layout: Layout, settings: Training, folder: Path | None, model: Any
) -> Tensor | None:
    """The reference's log-probabilities of the examples that are used, the others 0, (C, N); every process computes
    its share. None where no reference takes part, zeros where no table of it is read."""
    if settings.method == "sft":
        return None
    if folder is None or settings.loss in REFERENCE_FREE:
        return no_reference(data.examples)
    examples, used = data.examples, data.used
    share = [examples[i] for i in used[rank() :: world()]] or [examples[used[0]]]
    logps = reference_logps(
        model, share, folder=folder, rows=layout.rows, micro_batch_tokens=layout.micro_batch_tokens
    )
    whole = logps.new_zeros(len(examples[0].completions), len(examples))
    for number, part in enumerate(gathered(logps)):
        places = used[number :: world()]
        whole[:, places] = part[:, : len(places)]
    return whole


def compute_activations_twice(model: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its name to be, which transformers 5.19 lacks
        model.gradient_checkpointing_enable({"use_reentrant": False})


def checkpoint_to_go_on_from(folder: Path, metrics_file: Path) -> Path | None:
    """The checkpoint to go on from, with the metrics file as it was then."""
    if rank() == 0:
        last = checkpoints.last_checkpoint(folder, metrics_file)
        checkpoints.rewind_metrics(metrics_file, checkpoints.step_of(last))
    barrier()
    whole = checkpoints.sealed(folder)
    return whole[-1] if whole else None


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: pl.DataFrame,
    settings: Training,
    instructions: Mapping[str, str],
    seed: int,
) -> TrainingData:
    """The pairs as examples, some of them held out, and their steps; raises UserError when none is left to train on."""
    examples, dropped = encode_pairs(
        pairs,
        tokenizer,
        end=end_id(tokenizer, model.generation_config),
        max_tokens=settings.max_tokens,
        context=context_of(model.config),
        num_ids=model.get_input_embeddings().weight.shape[0],
        over_length=settings.over_length,
        chosen_only=settings.method == "sft",
        sft_on=settings.sft_on,
        instructions=instructions,
    )
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        parts[held_out(example.prompt_id, settings.validation_fraction)].append(example)
    training, validation = parts
    if not training:
        advice = _advice(dropped["reason"]) or ("training.validation_fraction" if validation else "")
        raise UserError(
            f"no pair to train on: of {len(pairs)} pairs {len(dropped)} were left out"
            f"{_first(dropped)} and {len(validation)} are held out for validation" + _change(advice)
        )
    steps = plan_steps(len(training), settings.batch_pairs, settings.epochs, seed, settings.updates)
    shortcuts = {} if settings.method == "sft" else shortcuts_of(pairs)
    return TrainingData(training + validation, len(training), steps, dropped, shortcuts)


def check_pairs(folder: Path) -> None:
    """Raise UserError for a stage that made no pair: its most frequent reasons, and the setting to change."""
    made = shards.shards(folder)
    if any(shard.rows for shard in made):
        return
    dropped = shards.read_dropped(folder).filter(pl.col("unit") != "flag")
    read = sum((Counter(shard.read) for shard in made), Counter[str]())
    reasons = shards.reasons(dropped)
    why = "; ".join(
        f"{count:,} of {read.get(unit, count):,} {unit}s: {reason}" for unit, reason, count in reasons[:3]
    )
    advice = _advice(reason for _, reason, _ in reasons)
    raise UserError(f"no pair to train on ({why or 'nothing was read'})" + _change(advice))


def _advice(reasons: Iterable[str]) -> str:
    """The settings to change for the first reason that has some."""
    fitting = (settings for reason in reasons for part, settings in SETTINGS_OF.items() if part in reason)
    return next(fitting, "")


def _change(settings: str) -> str:
    return f": expected another {settings}" if settings else ""


def _first(dropped: pl.DataFrame) -> str:
    if dropped.is_empty():
        return ""
    row = dropped.row(0, named=True)
    return f" (the first, {row['prompt_id']} in {row['language']}, because {row['reason']})"


def contents(folder: Path) -> list[str]:
    """What the files of an adapter are, by name and content."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, expected an adapter to start from")
    return [f"{path.name} {file_identity(str(path))}" for path in sorted(folder.iterdir()) if path.is_file()]


def prepare_scratch(
    scratch: Path, origin: list[str], settings: Training, seed: int, examples: Sequence[Example]
) -> None:
    """Make the folder of checkpoints and reference values, emptied of checkpoints that another run left there."""
    if rank() == 0:
        with writing(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
        run = blake2b(json.dumps([origin, settings.model_dump(mode="json"), seed]).encode(), digest_size=16)
        for example in examples:
            learnt = () if example.learnt is None else (example.learnt,)
            run.update(repr((example.prompt, example.completions, *learnt)).encode())
        key = scratch / "run.txt"
        if not key.is_file() or key.read_bytes() != run.hexdigest().encode():
            shutil.rmtree(scratch / "checkpoints", ignore_errors=True)
            write_text(key, run.hexdigest())
    barrier()


def use_fused_kernels(model: PreTrainedModel, examples: Sequence[Example] = ()) -> str | None:
    """Norms, rotary positions and gated activations as kernels of liger-kernel (extra `gpu`) for a model on a GPU; else
    why not. Its fused cross-entropy stays off, since `output_layer.py` computes what is wanted of the logits. Raises
    UserError for kernels that do not run on the examples, as they cannot be taken back."""
    if model.device.type != "cuda":
        return "the model is not on a GPU"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (the extra gpu)"
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.utils.versions import require_version

    try:
        require_version(LEAST_LIGER)
        apply_liger_kernel(model, LIGER)
    except Exception as error:  # noqa: BLE001 - of a version that does not fit, anything
        return f"liger-kernel does not fit: {one_line(error)}"
    try:
        with torch.no_grad():
            for example in examples:
                completion_logps(model, collate([example], rows="plain").to(next(model.parameters()).device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UserError(
            f"liger-kernel does not run here ({type(error).__name__}: {one_line(error)}): expected another version of "
            "it, or none (pip uninstall liger-kernel)"
        ) from error
    return None


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise UserError for a tracker that transformers does not know or that is not installed."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UserError(f"runtime.trackers names {name!r}, expected some of {known}")
        if find_spec(name) is None:
            raise UserError(
                f"runtime.trackers names {name!r}, which is not installed here, expected its package"
            )


@contextmanager
def tensorboard_in(folder: Path) -> Iterator[None]:
    """Where transformers looks for a place to log to: by itself it would log into the scratch folder."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:  # the user's choice
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        del os.environ[name]
