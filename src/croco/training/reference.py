"""Log-probabilities of every completion under the reference: computed once, before any adapter exists, and
kept.

They never change during training, so a second model in memory or a second forward per step buys nothing. The
table is keyed by the base's weights and by token ids, so epochs and restarts (and whoever passes the same
folder) read what is there. Left out: a reference that moves (online tuning).
"""

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedModel

from croco.errors import UserError
from croco.store import write_parquet
from croco.training.batches import collate, cut
from croco.training.encode import Example
from croco.training.forward import completion_logps

SCHEMA = pa.schema(
    [
        pa.field("base", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("logp", pa.float32(), nullable=False),
    ]
)
PART_EXAMPLES = 2048  # examples per file: what a kill costs
SAMPLED_WEIGHTS = 4096  # numbers of each tensor that enter the digest of the weights


def reference_logps(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    folder: Path,
    shared: bool,
    micro_batch_tokens: int,
    on_examples: Callable[[int], None] | None = None,
) -> Tensor:
    """log p(completion | prompt) under `model` of every completion, (C, N examples) float32, on the CPU.

    Values in `folder` are reused; the rest is computed and added to it. Raises `UserError` when one is not a
    finite number (broken weights). `on_examples` is told how many examples are done.
    """
    base = weights_digest(model)
    known = _read(folder, base)
    keys = [[_completion_key(example.prompt, ids) for ids in example.completions] for example in examples]
    missing = [i for i, row in enumerate(keys) if any(key not in known for key in row)]
    for start in range(0, len(missing), PART_EXAMPLES):
        part = missing[start : start + PART_EXAMPLES]
        new = _compute(model, examples, keys, part, shared, micro_batch_tokens)
        table = pa.table({"base": [base] * len(new), "completion": list(new), "logp": list(new.values())})
        number = len(list(folder.glob("part-*.parquet")))
        write_parquet(folder / f"part-{number:05d}.parquet", table, SCHEMA)
        known.update(new)
        if on_examples:
            on_examples(len(part))
    return torch.tensor([[known[key] for key in row] for row in keys], dtype=torch.float32).T.contiguous()


@torch.no_grad()
def _compute(
    model: PreTrainedModel,
    examples: Sequence[Example],
    keys: Sequence[Sequence[str]],
    part: Sequence[int],
    shared: bool,
    micro_batch_tokens: int,
) -> dict[str, float]:
    was_training = model.training
    model.eval()
    found: dict[str, float] = {}
    for rows in cut(part, [example.num_tokens for example in examples], micro_batch_tokens):
        batch = collate([examples[i] for i in rows], shared=shared).to(model.device)
        for c, logps in enumerate(completion_logps(model, batch).tolist()):
            found.update((keys[i][c], logp) for i, logp in zip(rows, logps, strict=True))
        for i in rows:
            if not all(np.isfinite(found[key]) for key in keys[i]):
                raise UserError(
                    f"the policy gives prompt {examples[i].prompt_id!r} ({examples[i].language}) a log-probability "
                    "that is not a finite number: are its weights broken?"
                )
    model.train(was_training)
    return found


def _read(folder: Path, base: str) -> dict[str, float]:
    known: dict[str, float] = {}
    for path in sorted(folder.glob("part-*.parquet")):
        table = pq.read_table(path, filters=[("base", "=", base)])
        known.update(zip(table["completion"].to_pylist(), table["logp"].to_pylist(), strict=True))
    return known


def _completion_key(prompt: Sequence[int], completion: Sequence[int]) -> str:
    ids = np.asarray([len(prompt), *prompt, *completion], dtype=np.int32)
    return blake2b(ids.tobytes(), digest_size=16).hexdigest()


def weights_digest(model: PreTrainedModel) -> str:
    """A digest of what the model computes: its configuration, and the shape, type and a sample of every
    tensor.
    """
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version", "use_cache")
    }
    digest = blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED_WEIGHTS)].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + sample.tobytes())
    return digest.hexdigest()
