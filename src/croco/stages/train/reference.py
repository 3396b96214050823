"""Log-probabilities of every completion under the reference: computed once, before any adapter exists, and kept.

The table is keyed by what the reference computes (configuration, weights and their type) and by token ids, so every
epoch, restart and arm that is given the same folder reads it. Writers may be killed and may run at the same time: a
file appears whole, and is named after its content. `on_line` computes the reference at every step instead."""

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from croco.errors import UserError, notice
from croco.stages.train.batches import Batch, Rows, collate, cut, row_tokens
from croco.stages.train.encode import Example
from croco.stages.train.forward import completion_logps
from croco.storage.shards import read_arrow, write_parquet

SCHEMA = pa.schema(
    [pa.field("completion", pa.string(), nullable=False), pa.field("logp", pa.float32(), nullable=False)]
)
PART_EXAMPLES = 2048  # examples per file: what a kill costs
SAMPLED_WEIGHTS = 4096  # numbers of each tensor that enter the digest of the weights as they are
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def reference_logps(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    folder: Path,
    rows: Rows,
    micro_batch_tokens: int,
    on_examples: Callable[[int], None] | None = None,
) -> Tensor:
    """log p(completion | prompt) under `model` of every completion, (C, N examples) float32, on the CPU.

    Values in `folder` are used again; the others are computed and added. `on_examples` is told how many are done.
    Raises `UserError` for a value that is not finite."""
    # tables that are there already are named with the space
    folder = folder / blake2b(f"{weights_digest(model)} ".encode(), digest_size=16).hexdigest()
    known = _read(folder)
    keys = [[_completion_key(example.prompt, ids) for ids in example.completions] for example in examples]
    missing = [i for i, row in enumerate(keys) if any(key not in known for key in row)]
    for start in range(0, len(missing), PART_EXAMPLES):
        part = missing[start : start + PART_EXAMPLES]
        new = _compute(model, examples, keys, part, rows, micro_batch_tokens)
        table = pa.table({"completion": list(new), "logp": list(new.values())})
        name = blake2b("".join(sorted(new)).encode(), digest_size=16).hexdigest()
        write_parquet(folder / f"part-{name}.parquet", table, SCHEMA)
        known.update(new)
        if on_examples:
            on_examples(len(part))
    return torch.tensor([[known[key] for key in row] for row in keys], dtype=torch.float32).T.contiguous()


def no_reference(examples: Sequence[Example]) -> Tensor:
    """Zeros, (C, N), for losses that look at no reference (`losses.REFERENCE_FREE`)."""
    return torch.zeros(len(examples[0].completions), len(examples))


@torch.no_grad()
def on_line(model: nn.Module, batch: Batch) -> Tensor:
    """The reference's log-probabilities of a batch, (C, P): the policy with its adapter switched off, mode and adapter
    left as they were. Raises `UserError` when there is no adapter."""
    adapted: Any = model
    while hasattr(adapted, "module"):
        adapted = adapted.module
    if not hasattr(adapted, "disable_adapter"):
        raise UserError(
            f"a reference on line is a policy without its adapter, and {type(adapted).__name__} has none"
        )
    was_training = model.training
    model.eval()
    try:
        with adapted.disable_adapter():
            return completion_logps(model, batch)
    finally:
        model.train(was_training)


@torch.no_grad()
def _compute(
    model: PreTrainedModel,
    examples: Sequence[Example],
    keys: Sequence[Sequence[str]],
    part: Sequence[int],
    rows: Rows,
    micro_batch_tokens: int,
) -> dict[str, float]:
    was_training = model.training
    model.eval()
    logp_of: dict[str, float] = {}
    lengths = [row_tokens(example, rows) for example in examples]
    for some in cut(part, lengths, micro_batch_tokens, packed=rows == "packed"):
        batch = collate([examples[i] for i in some], rows=rows).to(model.device)
        for c, logps in enumerate(completion_logps(model, batch).tolist()):
            logp_of.update((keys[i][c], logp) for i, logp in zip(some, logps, strict=True))
        for i in some:
            if not all(np.isfinite(logp_of[key]) for key in keys[i]):
                raise UserError(
                    f"the policy gives prompt {examples[i].prompt_id!r} ({examples[i].language}) a log-probability "
                    "that is not a finite number: are its weights broken?"
                )
    model.train(was_training)
    return logp_of


def _read(folder: Path) -> dict[str, float]:
    known: dict[str, float] = {}
    for path in sorted(folder.glob("part-*.parquet")):
        try:
            table = read_arrow(path)
        except UserError as error:
            notice(f"{error}: these values are computed again")
            path.unlink()
            continue
        if table.schema.names != SCHEMA.names:
            raise UserError(f"{path} was not made by croco, expected another run.folder, or no such file")
        known.update(zip(table["completion"].to_pylist(), table["logp"].to_pylist(), strict=True))
    return known


def _completion_key(prompt: Sequence[int], completion: Sequence[int]) -> str:
    ids = np.asarray([len(prompt), *prompt, *completion], dtype=np.int32)
    return blake2b(ids.tobytes(), digest_size=16).hexdigest()


def weights_digest(model: PreTrainedModel) -> str:
    """A digest of what the model computes: configuration, and shape, type, a sample and the sum of the bits of every
    tensor (which any one change moves)."""
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version", "use_cache")
    }
    digest = blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED_WEIGHTS)].float().cpu().numpy()
        bits = flat.view(BITS[flat.element_size()]).sum(dtype=torch.int64).item()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {bits}".encode() + sample.tobytes())
    return digest.hexdigest()
