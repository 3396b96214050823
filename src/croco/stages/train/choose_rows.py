"""The quickest way to lay pairs out in rows that is exact on this model, tried on real pairs against plain rows.

Shapes: P pairs, C completions of a pair."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from croco.errors import one_line
from croco.models.attention.rows import no_varlen
from croco.models.attention.support import depends_on_batch, unsupported
from croco.models.output_layer import unwrapped
from croco.stages.train.batches import Batch, Rows, collate
from croco.stages.train.encode import Example
from croco.stages.train.forward import completion_logps, layer_kinds, token_counts

LAYER_KINDS = ("full_attention", "sliding_attention")
# Largest difference of a completion's mean token log-probability between shared and plain rows. Exact layouts differ by
# rounding (1e-6 in float32, up to 1e-2 in bfloat16); a lost prompt or a leak differs by 0.1 and more.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
TOLERANCE_HALF = 3e-2
# of a prompt, or a completion, whose gradient is tried: activations of whole pairs, all kept, may take more than tuning
GRADIENT_TOKENS = 256


def choose_rows(model: PreTrainedModel, examples: Sequence[Example]) -> tuple[Rows, str | None]:
    """The quickest exact way for these pairs, and why not a quicker one: packed rows on a GPU or segments on a CPU,
    then a mask, then plain rows. The model is as before afterwards."""
    if depends_on_batch(model.config):
        return "single", "its numbers follow from the longest row beside a row"
    reasons: list[str] = []
    quickest: Rows = "packed" if model.device.type == "cuda" else "segments"
    for rows in (quickest, "masked"):
        reason = why_not(model, rows) or rows_differ(model, examples, rows)
        if reason is None:
            return rows, reasons[0] if reasons else None
        reasons.append(reason)
    return "plain", reasons[-1]


def why_not(model: nn.Module, rows: Rows) -> str | None:
    """Why these rows cannot be tried on this model here, or None. The proof on pairs is `rows_differ`."""
    base = unwrapped(model)
    implementation = base.config.get_text_config()._attn_implementation
    if rows == "masked":
        if implementation not in ("sdpa", "eager"):
            return f"attention is {implementation}, an explicit mask needs sdpa or eager"
        unknown = sorted(set(layer_kinds(base)) - set(LAYER_KINDS))
        return f"{type(base).__name__} has layers of kind {', '.join(unknown)}" if unknown else None
    if implementation != "sdpa":
        return f"attention is {implementation}, expected sdpa"
    return unsupported(base) or (no_varlen(base.device, base.dtype) if rows == "packed" else None)


def rows_differ(model: nn.Module, examples: Sequence[Example], rows: Rows) -> str | None:
    """How real pairs in these rows differ from plain ones, in one sentence, or None when they are exact.

    The log-probabilities must be equal within rounding, and must not change when another completion's tokens do. The
    gradient must be finite: padding that sees nothing may make it NaN."""
    base = unwrapped(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            plain_logps = completion_logps(model, collate(examples, rows="plain").to(base.device))
            batch = collate(examples, rows=rows).to(base.device)
            # which of the two ways segments go depends on a batch's lengths
            ways: list[Rows] = ["segments", "masked"] if rows == "segments" else [rows]
            reason = next(
                filter(None, (_differs(model, replace(batch, rows=w), plain_logps) for w in ways)), None
            )
        few = sorted(examples, key=lambda example: example.num_tokens)[:2]
        most = (GRADIENT_TOKENS // 2, GRADIENT_TOKENS)  # of other lengths, so that there is padding
        short = [_end(example, tokens) for example, tokens in zip(few, most, strict=False)]
        return reason or _no_gradient(base, collate(short, rows=rows).to(base.device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - code at a mask it does not expect, kernels
        return f"{type(base).__name__} does not run them: {type(error).__name__}: {one_line(error)}"
    finally:
        model.train(was_training)


def _end(example: Example, most: int) -> Example:
    """The last tokens of the prompt and of each completion; all where none of those would be learnt."""
    learnt = example.learnt and example.learnt[-most:]
    if learnt is not None and not any(learnt):
        return example
    completions = tuple(ids[-most:] for ids in example.completions)
    return replace(example, prompt=example.prompt[-most:], completions=completions, learnt=learnt)


def _no_gradient(model: PreTrainedModel, batch: Batch) -> str | None:
    weight = model.get_input_embeddings().weight
    trained = weight.requires_grad
    weight.requires_grad_(True)
    try:
        (gradient,) = torch.autograd.grad(completion_logps(model, batch).sum(), [weight])
    finally:
        weight.requires_grad_(trained)
    return None if bool(gradient.isfinite().all()) else "gradients are not finite"


def _differs(model: nn.Module, shared: Batch, plain_logps: Tensor) -> str | None:
    counts = token_counts(shared)
    shared_logps = completion_logps(model, shared)
    gap = ((shared_logps - plain_logps).abs() / counts).max().item()
    # Only the first completion's ids change, and no shape does: nothing but a leak can move the others.
    first = shared.branch_BT == 1
    flipped = torch.where(first, shared.input_ids_BT.flip(0, 1).roll(1, 1), shared.input_ids_BT)
    moved_logps = completion_logps(model, replace(shared, input_ids_BT=flipped))
    leak = ((shared_logps - moved_logps).abs() / counts)[1:].max().item() if counts.shape[0] > 1 else 0.0
    tolerance = TOLERANCE.get(unwrapped(model).dtype, TOLERANCE_HALF)
    if not gap <= tolerance:
        return f"log-probabilities per token differ by {gap:.2g} from plain rows (allowed: {tolerance:.0e})"
    if not leak <= tolerance:
        return f"one completion moves another's log-probability per token by {leak:.2g} (allowed: {tolerance:.0e})"
    return None
