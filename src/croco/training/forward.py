"""From a batch to the log-probability of every completion, through the model's own code, and the proof that
it is exact.

The model runs its own forward, head included (Cohere2 scales its logits, Gemma caps them); a hook gathers the
hidden states that predict completion tokens just before the output layer, so the vocabulary meets only those.
Shared rows need a mask per kind of attention layer; a model for which they cannot be proven exact on real
pairs is run on plain rows. Left out: FlexAttention and packing.

Shapes: B rows, T tokens, M completion tokens, V vocabulary, D width, P pairs, C completions of a pair.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from croco.ops.logps import sequence_sums, token_logps
from croco.ops.prefix_mask import PADDING, additive, prefix_mask
from croco.training.batches import Batch, collate
from croco.training.encode import Example

LAYER_KINDS = ("full_attention", "sliding_attention")
# Largest difference of a completion's mean token log-probability between shared and plain rows. Exact layouts differ by
# rounding (1e-6 in float32, up to 1e-2 in bfloat16); a lost prompt or a leak differs by 0.1 and more.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
TOLERANCE_HALF = 3e-2


def completion_logps(model: nn.Module, batch: Batch) -> Tensor:
    """log p(completion | prompt) of every completion, (C, P) float32; row 0 are the chosen ones."""
    logits_MV = completion_logits(model, batch)
    sums = sequence_sums(
        token_logps(logits_MV, batch.target_M), batch.sequence_M, batch.num_completions * batch.num_pairs
    )
    return sums.view(batch.num_completions, batch.num_pairs)


def completion_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits that predict each completion token, (M, V), in the model's type."""
    base = _unwrapped(model)
    mask: Tensor | dict[str, Tensor] = (
        attention_masks(base, batch) if batch.shared else (batch.branch_BT != PADDING).long()
    )
    with _head_at(base, batch.source_M):
        logits = model(
            input_ids=batch.input_ids_BT, attention_mask=mask, position_ids=batch.position_BT, use_cache=False
        ).logits
    return logits.view(-1, logits.shape[-1])


def token_counts(batch: Batch) -> Tensor:
    """Tokens of every completion, the end token included, (C, P)."""
    counts = torch.bincount(batch.sequence_M, minlength=batch.num_completions * batch.num_pairs)
    return counts.view(batch.num_completions, batch.num_pairs)


def _unwrapped(model: Any) -> PreTrainedModel:
    """The Hugging Face model inside wrappers (distributed ones keep it in `module`, PEFT offers it itself)."""
    while hasattr(model, "module"):
        model = model.module
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


@contextmanager
def _head_at(model: PreTrainedModel, source_M: Tensor) -> Iterator[None]:
    """Let the output layer see only the hidden states at the given columns of the flattened (B * T) grid, as
    (1, M, D).
    """

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTD = args[0]
        return (hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[source_M][None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def why_not_shared(model: nn.Module) -> str | None:
    """Why shared rows cannot be tried on this architecture, or None. The proof on a batch is
    `shared_rows_differ`.
    """
    base = _unwrapped(model)
    config = base.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention is {config._attn_implementation}, an explicit mask needs sdpa or eager"
    if unknown := sorted(set(_layer_kinds(base)) - set(LAYER_KINDS)):
        return f"{type(base).__name__} has layers of kind {', '.join(unknown)}"
    return None


def _layer_kinds(model: PreTrainedModel) -> list[str]:
    config = model.config.get_text_config()
    if kinds := getattr(config, "layer_types", None):
        return sorted(set(kinds))
    return ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]


def attention_masks(model: PreTrainedModel, batch: Batch) -> Tensor | dict[str, Tensor]:
    """The explicit mask of shared rows, (B, 1, T, T); a mapping from layer kind to mask where a model mixes
    kinds.
    """
    config = model.config.get_text_config()
    masks = {}
    for kind in _layer_kinds(model):
        window = config.sliding_window if kind == "sliding_attention" else None
        mask = prefix_mask(batch.branch_BT, batch.position_BT, window)
        masks[kind] = additive(mask, model.dtype) if config._attn_implementation == "eager" else mask
    return masks if len(masks) > 1 else next(iter(masks.values()))


@torch.no_grad()
def shared_rows_differ(model: nn.Module, examples: Sequence[Example], device: torch.device) -> str | None:
    """Run real pairs in shared and in plain rows; what differs in one sentence, or None when shared rows are
    exact.

    Two proofs: the log-probabilities equal those of plain rows within rounding, and exchanging the tokens of
    the first completion leaves the others' where they were. Runs with dropout off, and leaves the model's
    mode as it was.
    """
    if reason := why_not_shared(model):
        return reason
    was_training = model.training
    model.eval()
    shared, plain = (collate(examples, shared=layout).to(device) for layout in (True, False))
    counts = token_counts(shared)
    shared_logps = completion_logps(model, shared)
    gap = ((shared_logps - completion_logps(model, plain)).abs() / counts).max().item()
    # Only the first completion's ids change, and no shape does: nothing but a leak can move the others.
    first = shared.branch_BT == 1
    flipped = torch.where(first, shared.input_ids_BT.flip(0).roll(1, 1), shared.input_ids_BT)
    moved_logps = completion_logps(model, replace(shared, input_ids_BT=flipped))
    leak = ((shared_logps - moved_logps).abs() / counts)[1:].max().item() if counts.shape[0] > 1 else 0.0
    model.train(was_training)
    tolerance = TOLERANCE.get(_unwrapped(model).dtype, TOLERANCE_HALF)
    if not gap <= tolerance:
        return f"log-probabilities per token differ by {gap:.2g} from plain rows (allowed: {tolerance:.0e})"
    if not leak <= tolerance:
        return f"one completion moves another's log-probability per token by {leak:.2g} (allowed: {tolerance:.0e})"
    return None
