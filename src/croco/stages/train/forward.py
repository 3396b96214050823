"""From a batch to the log-probability of every completion, through the model's own code, and the proof that it is
exact.

The model runs its own forward. A hook gathers the hidden states that predict completion tokens just before the output
layer, so the vocabulary meets only those; where it is known what an architecture makes of its logits (Cohere scales
them, Gemma caps them) the output layer is `logps.head_logps`, which never holds all of them. Shared rows need a mask
per kind of attention layer, or on a CPU attention that goes by segments (`rows.py`); a model for which they
cannot be proven exact on real pairs, against its own head on plain rows, is run on plain rows. The last layer of the
same architectures is finished where it is read only (`models/attention/last_layer.py`).

Shapes: B rows, T tokens, M completion tokens, V vocabulary, D width, P pairs, C completions of a pair.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

from croco.models.attention import rows
from croco.models.attention.decode import plugged_in
from croco.models.attention.last_layer import finished_at
from croco.models.attention.mask import BLOCK, PADDING, additive, prefix_mask, prefix_rule
from croco.models.attention.rows import Segments
from croco.models.attention.support import unsupported
from croco.stages.train.batches import Batch, collate
from croco.stages.train.encode import Example
from croco.stages.train.logps import head_logps, sequence_sums, token_logps

# Architectures (model_type) that do no more to their logits than `_known_head` says.
HEADS = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "cohere", "cohere2", "granite", "olmo2",
    "phi3", "smollm3",
)  # fmt: skip
FLEX = "flex_attention"
LAYER_KINDS = ("full_attention", "sliding_attention")
# Largest difference of a completion's mean token log-probability between shared and plain rows. Exact layouts differ by
# rounding (1e-6 in float32, up to 1e-2 in bfloat16); a lost prompt or a leak differs by 0.1 and more.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
TOLERANCE_HALF = 3e-2


def completion_logps(model: nn.Module, batch: Batch) -> Tensor:
    """log p(completion | prompt) of every completion, (C, P) float32; row 0 are the chosen ones."""
    head = _known_head(_unwrapped(model)) if batch.shared else None
    if head is None:
        logps_M = token_logps(completion_logits(model, batch), batch.target_M)
    else:
        layer, scale, cap = head
        hidden_MD = _run(model, batch, whole_head=False)
        logps_M = head_logps(hidden_MD, layer.weight, layer.bias, batch.target_M, scale=scale, cap=cap)
    sums = sequence_sums(logps_M, batch.sequence_M, batch.num_completions * batch.num_pairs)
    return sums.view(batch.num_completions, batch.num_pairs)


def completion_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits that predict each completion token, (M, V), in the model's type."""
    return _run(model, batch, whole_head=True)


def _known_head(model: PreTrainedModel) -> tuple[nn.Linear, float, float | None] | None:
    """The output layer, the scale of its logits and their cap, for architectures whose code has been read; else None.

    None too for a layer that is no plain one: adapted, or spread over processes.
    """
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    if config.model_type not in HEADS or type(layer) is not nn.Linear:
        return None
    if layer.weight.dim() != 2 or isinstance(layer.weight, DTensor):
        return None
    scale = getattr(model, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
    return layer, scale, getattr(config, "final_logit_softcapping", None)


def _run(model: nn.Module, batch: Batch, whole_head: bool) -> Tensor:
    """The model's own forward: the logits of completion tokens, (M, V), or the hidden states before them, (M, D)."""
    base = _unwrapped(model)
    inputs: dict[str, Any] = {}
    known = batch.shared and base.config.get_text_config().model_type in HEADS and not _recomputed(base)
    segments = _segments(base, batch, known) if batch.shared else None
    if segments is not None:  # a mask that nobody reads, or transformers would make one
        inputs = {"attention_mask": batch.input_ids_BT.new_ones(1, 1, 1, 1), "segments": segments}
    elif batch.shared:
        inputs = {"attention_mask": attention_masks(base, batch)}
    else:
        inputs = {"attention_mask": (batch.branch_BT != PADDING).long()}
    with (
        finished_at(base, batch.source_M, batch.input_ids_BT.numel()) if known else nullcontext(),
        nullcontext() if segments is None else plugged_in(base, rows.NAME),
        _head_at(base, batch.source_M, whole_head) as gathered,
    ):
        logits = model(
            input_ids=batch.input_ids_BT, position_ids=batch.position_BT, use_cache=False, **inputs
        ).logits
    return logits.view(-1, logits.shape[-1]) if whole_head else gathered[0]


def _segments(model: PreTrainedModel, batch: Batch, known: bool) -> Segments | None:
    """How attention goes by segments, where that is quicker than a mask: long rows on a CPU."""
    if not batch.by_segments or batch.input_ids_BT.device.type != "cpu" or unsupported(model) is not None:
        return None
    if model.config.get_text_config()._attn_implementation != "sdpa":
        return None
    last = model.config.get_text_config().num_hidden_layers - 1 if known else None
    return None if _recomputed(model) else Segments.of(batch.lengths, last)


def _recomputed(model: PreTrainedModel) -> bool:
    """Whether layers run again in the backward pass, when what is plugged in for a forward is gone."""
    return model.training and any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


def dropout_of(model: nn.Module) -> list[tuple[Any, str, float]]:
    """Where a model's own code keeps a rate of dropout: (module or config, attribute, rate). LoRA's are left out.

    In layers, as numbers that modules hand to functions, and in the config, which a few read at every forward.
    """
    places: dict[tuple[int, str], tuple[Any, str, float]] = {}
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            places[id(module), "p"] = (module, "p", module.p)
        for owner in (module, getattr(module, "config", None)):
            for attribute, value in vars(owner).items() if owner is not None else ():
                if isinstance(value, float) and "drop" in attribute:
                    places[id(owner), attribute] = (owner, attribute, value)
    return [place for place in places.values() if place[2]]


@contextmanager
def switched_off(places: Iterable[tuple[Any, str, float]]) -> Iterator[None]:
    """Without a model's own dropout, as in TRL: policy and reference must be the same function where training begins.

    Only for a step, so that a config that is saved says what it said.
    """
    places = list(places)
    try:
        for owner, attribute, _ in places:
            setattr(owner, attribute, 0.0)
        yield
    finally:
        for owner, attribute, rate in places:
            setattr(owner, attribute, rate)


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
def _head_at(model: PreTrainedModel, source_M: Tensor, whole: bool) -> Iterator[list[Tensor]]:
    """Gather the hidden states at the given columns of the flattened (B * T) grid before the output layer, (M, D).

    They are in the list that is yielded, and if `whole` what the output layer sees; else it sees one token.
    """
    gathered: list[Tensor] = []

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_ND = args[0].reshape(-1, args[0].shape[-1])
        gathered.append(hidden_ND.index_select(0, source_M))
        return ((gathered[0] if whole else hidden_ND[:1].detach())[None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield gathered
    finally:
        handle.remove()


def packs(model: nn.Module) -> bool:
    """Whether shared rows are packed into one: where FlexAttention skips what its blocks forbid."""
    return bool(_unwrapped(model).config.get_text_config()._attn_implementation == FLEX)


def try_packing(model: PreTrainedModel, examples: Sequence[Example], device: torch.device) -> str | None:
    """Give the model FlexAttention, so that its rows are packed, if that is exact on real pairs; else why not.

    On CUDA only: on a CPU FlexAttention has no backward. The model is left as it was where it fails, be it that its
    kernels cannot be compiled there.
    """
    before = model.config.get_text_config()._attn_implementation
    if device.type != "cuda" or before != "sdpa":
        return f"rows are packed on CUDA and in place of sdpa, found {device.type} and {before}"
    try:
        model.set_attn_implementation(FLEX)
        reason = shared_rows_differ(model, examples, device) or _no_gradient(model, examples, device)
    except torch.OutOfMemoryError:  # a RuntimeError too, and no word against the kernels
        raise
    except (RuntimeError, ValueError, NotImplementedError) as error:  # compilers raise all of them
        reason = f"FlexAttention does not run here: {' '.join(str(error).split())[:200]}"
    if reason:
        model.set_attn_implementation(before)
    return reason


def _no_gradient(model: PreTrainedModel, examples: Sequence[Example], device: torch.device) -> str | None:
    """Why packed rows cannot be trained on, or None: a backward may fail to compile where a forward runs."""
    weight = model.get_input_embeddings().weight
    trained = weight.requires_grad
    weight.requires_grad_(True)
    try:
        logps = completion_logps(model, collate(examples, shared=True, packed=True).to(device))
        (gradient,) = torch.autograd.grad(logps.sum(), [weight])
    finally:
        weight.requires_grad_(trained)
    return None if bool(gradient.isfinite().all()) else "FlexAttention's gradients are not finite"


def why_not_shared(model: nn.Module) -> str | None:
    """Why shared rows cannot be tried on this architecture, or None. The proof on a batch is
    `shared_rows_differ`.
    """
    base = _unwrapped(model)
    config = base.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager", FLEX):
        return f"attention is {config._attn_implementation}, an explicit mask needs sdpa, eager or {FLEX}"
    if unknown := sorted(set(_layer_kinds(base)) - set(LAYER_KINDS)):
        return f"{type(base).__name__} has layers of kind {', '.join(unknown)}"
    return None


def _layer_kinds(model: PreTrainedModel) -> list[str]:
    config = model.config.get_text_config()
    if kinds := getattr(config, "layer_types", None):
        return sorted(set(kinds))
    return ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]


def _blocks(batch: Batch, window: int | None) -> BlockMask:
    rule = prefix_rule(batch.branch_BT, batch.position_BT, batch.pair_BT, window)
    (num_rows, num_tokens), device = batch.input_ids_BT.shape, batch.input_ids_BT.device
    compiled = device.type == "cuda"  # else the mask of the whole row is in memory for a moment
    return create_block_mask(
        rule, num_rows, None, num_tokens, num_tokens, device=device, BLOCK_SIZE=BLOCK, _compile=compiled
    )


def attention_masks(
    model: PreTrainedModel, batch: Batch
) -> Tensor | BlockMask | dict[str, Tensor | BlockMask]:
    """The explicit mask of shared rows, (B, 1, T, T), or FlexAttention's blocks; a mapping from layer kind to mask
    where a model mixes kinds.
    """
    config = model.config.get_text_config()
    masks: dict[str, Tensor | BlockMask] = {}
    for kind in _layer_kinds(model):
        window = config.sliding_window if kind == "sliding_attention" else None
        if config._attn_implementation == FLEX:
            masks[kind] = _blocks(batch, window)
            continue
        mask = prefix_mask(batch.branch_BT, batch.position_BT, window, batch.pair_BT)
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
    try:
        shared = collate(examples, shared=True, packed=packs(model)).to(device)
        plain_logps = completion_logps(model, collate(examples, shared=False).to(device))
        # On a CPU it depends on a batch's lengths which of two ways it goes.
        ways = [replace(shared, by_segments=w) for w in (False, True)] if device.type == "cpu" else [shared]
        return next(filter(None, (_differs(model, way, plain_logps) for way in ways)), None)
    finally:
        model.train(was_training)


def _differs(model: nn.Module, shared: Batch, plain_logps: Tensor) -> str | None:
    counts = token_counts(shared)
    shared_logps = completion_logps(model, shared)
    gap = ((shared_logps - plain_logps).abs() / counts).max().item()
    # Only the first completion's ids change, and no shape does: nothing but a leak can move the others.
    first = shared.branch_BT == 1
    flipped = torch.where(first, shared.input_ids_BT.flip(0, 1).roll(1, 1), shared.input_ids_BT)
    moved_logps = completion_logps(model, replace(shared, input_ids_BT=flipped))
    leak = ((shared_logps - moved_logps).abs() / counts)[1:].max().item() if counts.shape[0] > 1 else 0.0
    tolerance = TOLERANCE.get(_unwrapped(model).dtype, TOLERANCE_HALF)
    if not gap <= tolerance:
        return f"log-probabilities per token differ by {gap:.2g} from plain rows (allowed: {tolerance:.0e})"
    if not leak <= tolerance:
        return f"one completion moves another's log-probability per token by {leak:.2g} (allowed: {tolerance:.0e})"
    return None
