"""From a batch to the log-probability of every completion, through the model's own forward.

A hook gathers the hidden states that predict completion tokens before the output layer, so the vocabulary meets only
those. Where it is known what an architecture makes of its logits (Cohere scales them, Gemma caps them), a known head
stands for the output layer and never holds all logits, and the last layer is finished only where it is read.

Shapes: B rows, T tokens, M completion tokens, V vocabulary, D width, P pairs, C completions of a pair."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from croco.models.attention import rows as row_attention
from croco.models.attention.decode import plugged_in
from croco.models.attention.last_layer import finished_at
from croco.models.attention.mask import PADDING, additive, prefix_mask
from croco.models.attention.rows import PackedSegments, Segments
from croco.models.attention.support import forget_lengths
from croco.models.output_layer import HEADS, head_at, known_head, parted_logps, unwrapped
from croco.stages.train.batches import Batch

Inputs = dict[str, Any]  # of a model's forward, beside ids and positions


def completion_logps(model: nn.Module, batch: Batch, inputs: Inputs | None = None) -> Tensor:
    """log p(completion | prompt) of every completion, (C, P) float32, the chosen ones in row 0. `inputs` are those of
    `prepared`, where the caller holds it open until the gradients are computed."""
    if batch.singles:
        alone = []
        for single in batch.singles:
            forget_lengths(unwrapped(model))  # or a row's numbers follow from those before it
            alone.append(completion_logps(model, single))
        return torch.cat(alone).view(batch.num_completions, -1)
    if inputs is None:
        base = unwrapped(model)
        recomputed = base.training and any(
            getattr(m, "gradient_checkpointing", False) for m in base.modules()
        )
        with prepared(model, batch, recomputed) as own:
            return completion_logps(model, batch, own)
    head = known_head(unwrapped(model)) if batch.shared else None
    logps = head or parted_logps
    logps_M = logps(_run(model, batch, inputs, whole_head=head is None), batch.target_M)
    sums = sequence_sums(logps_M, batch.sequence_M, batch.num_completions * batch.num_pairs)
    return sums.view(batch.num_completions, batch.num_pairs)


@contextmanager
def prepared(model: nn.Module, batch: Batch, recomputed: bool = False) -> Iterator[Inputs]:
    """Within it, the model's attention goes by the batch's rows. `recomputed`: its layers run again later, without what
    is plugged in, so shared rows go by a mask."""
    base = unwrapped(model)
    if not batch.shared:
        yield {"attention_mask": (batch.branch_BT != PADDING).long()}
        return
    known = base.config.get_text_config().model_type in HEADS and not recomputed
    if batch.rows == "masked" or recomputed:
        attention: Any = nullcontext()
        inputs: Inputs = {"attention_mask": attention_masks(base, batch)}
    else:
        attention = plugged_in(base, row_attention.NAME)
        last = base.config.get_text_config().num_hidden_layers - 1 if known else None
        packed = batch.rows == "packed"
        inputs = {
            # a mask that is not read; without it transformers would make one
            "attention_mask": batch.input_ids_BT.new_ones(1, 1, 1, 1),
            "segments": PackedSegments.of(batch.lengths, batch.input_ids_BT.device)
            if packed
            else Segments.of(batch.lengths, last),
        }
    with attention, finished_at(base, batch.read_N, batch.input_ids_BT.numel()) if known else nullcontext():
        yield inputs


@contextmanager
def routing(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, the list that is yielded gets the logits of every router, (B * T, experts) each, where the config
    weighs them."""
    base: Any = unwrapped(model)
    logits: list[Tensor] = []
    recorder: Any = (
        getattr(base, "_can_record_outputs", None)
        or getattr(base.base_model, "_can_record_outputs", None)
        or {}
    )
    recorded = recorder.get("router_logits") if balance_weight(base) else None
    kind, index = getattr(recorded, "target_class", recorded), getattr(recorded, "index", 0)
    routers: list[Any] = [m for m in base.modules() if isinstance(kind, type) and isinstance(m, kind)]

    def keep(_module: Any, _args: Any, output: Any) -> None:
        logits.append(output[index] if isinstance(output, tuple) else output)

    handles = [router.register_forward_hook(keep) for router in routers]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


def balance_weight(model: PreTrainedModel) -> float:
    """What the model's config weighs the balance of its experts with, as TRL reads it; 0 without experts."""
    config = model.config.get_text_config()
    return getattr(config, "router_aux_loss_coef", 0.0) if hasattr(config, "output_router_logits") else 0.0


def balance_loss(model: nn.Module, logits: Sequence[Tensor], batch: Batch) -> Tensor:
    """How unevenly tokens go to experts, by the model's own function (Switch Transformer, arXiv 2101.03961, equations 4
    to 6), times the config's weight; padding does not count."""
    base: Any = unwrapped(model)
    own = sys.modules[type(base).__module__].load_balancing_loss_func
    mask = (batch.branch_BT != PADDING).long()
    loss: Tensor = own(tuple(logits), base.num_experts, base.num_experts_per_tok, mask)
    return balance_weight(base) * loss


def _run(model: nn.Module, batch: Batch, inputs: Inputs, whole_head: bool) -> Tensor:
    """The model's own forward: the logits of completion tokens, (M, V), or the hidden states before them, (M, D)."""
    with head_at(unwrapped(model), batch.source_M, whole_head) as gathered:
        logits = model(
            input_ids=batch.input_ids_BT, position_ids=batch.position_BT, use_cache=False, **inputs
        ).logits
    return logits.view(-1, logits.shape[-1]) if whole_head else gathered[0]


def noise_of(model: nn.Module) -> list[tuple[Any, str]]:
    """Where a model keeps what makes its training random, as (module or config, attribute): rates of dropout but
    LoRA's, in layers, in numbers that modules hand on, and in the config; and routers with jitter, which draw experts.
    """
    places: dict[tuple[int, str], tuple[Any, str]] = {}
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            places[id(module), "p"] = (module, "p")
        if any("jitter" in attribute for attribute in vars(module)):
            places[id(module), "training"] = (module, "training")
        for owner in (module, getattr(module, "config", None)):
            for attribute, value in vars(owner).items() if owner is not None else ():
                if isinstance(value, float) and "drop" in attribute:
                    places[id(owner), attribute] = (owner, attribute)
    return list(places.values())


@contextmanager
def switched_off(places: Iterable[tuple[Any, str]]) -> Iterator[None]:
    """Without a model's own noise: policy and reference must be the same function where training begins. For a step
    only, so that a saved config is unchanged."""
    before = [(owner, attribute, getattr(owner, attribute)) for owner, attribute in places]
    try:
        for owner, attribute, value in before:
            setattr(owner, attribute, type(value)(0))
        yield
    finally:
        for owner, attribute, value in before:
            setattr(owner, attribute, value)


def sequence_sums(values_M: Tensor, sequence_M: Tensor, num_sequences: int) -> Tensor:
    """Sums of the values of each sequence, (S,); `sequence_M` is the sequence, 0 to S - 1, of each token. One without
    tokens has 0."""
    return values_M.new_zeros(num_sequences).index_add(0, sequence_M, values_M)


def token_counts(batch: Batch) -> Tensor:
    """Tokens of every completion, the end token included, (C, P)."""
    num_sequences = batch.num_completions * batch.num_pairs
    counts = sequence_sums(torch.ones_like(batch.sequence_M), batch.sequence_M, num_sequences)
    return counts.view(batch.num_completions, batch.num_pairs)


def layer_kinds(model: PreTrainedModel) -> list[str]:
    config = model.config.get_text_config()
    if kinds := getattr(config, "layer_types", None):
        return sorted(set(kinds))
    return ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]


def attention_masks(model: PreTrainedModel, batch: Batch) -> Tensor | dict[str, Tensor]:
    """The explicit mask of shared rows, (B, 1, T, T); a mapping from layer kind to mask where a model mixes kinds."""
    config = model.config.get_text_config()
    masks: dict[str, Tensor] = {}
    for kind in layer_kinds(model):
        window = config.sliding_window if kind == "sliding_attention" else None
        mask = prefix_mask(batch.branch_BT, batch.position_BT, window, batch.pair_BT)
        masks[kind] = additive(mask, model.dtype) if config._attn_implementation == "eager" else mask
    return masks if len(masks) > 1 else next(iter(masks.values()))
