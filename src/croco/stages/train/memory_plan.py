"""Whether tuning fits in memory, said before the first step, and with how many tokens at once.

The bytes of a token are counted on a forward of one pair: every tensor that autograd saves, parameters apart. Gradients
and AdamW's moments follow from what is trained. Left out: fragmentation (a margin allows for it), and weights that FSDP
or DeepSpeed spread over processes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from croco.config.training import Training
from croco.errors import UserError
from croco.models.lora import trainable, without_adapter
from croco.models.memory import free_bytes, free_text, gib
from croco.stages.train.batches import Rows, collate, row_tokens
from croco.stages.train.encode import Example
from croco.stages.train.forward import completion_logps, noise_of, switched_off

MARGIN = 0.85  # of the free memory that "auto" uses
MOST_TOKENS, MOST_ON_A_GPU = 16384, 32768  # of a micro-batch: above it speed grows no more
PROBE_TOKENS = 64  # a pair of at least so many, where there is one
STATE_BYTES = 12  # of a trained number: its gradient and two moments, in float32
CPU = torch.device("cpu")
SPREAD = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


@dataclass(frozen=True)
class Plan:
    """How a machine works through a step: tokens of a micro-batch, and whether activations are computed twice."""

    micro_batch_tokens: int
    gradient_checkpointing: bool


@dataclass(frozen=True)
class Needs:
    """Bytes beside the loaded weights: once, and per token of a micro-batch as it is and with checkpointing."""

    once: int
    per_token: float
    per_token_checkpointed: float

    def of(self, tokens: int, checkpointing: bool) -> float:
        return self.once + tokens * (self.per_token_checkpointed if checkpointing else self.per_token)


def plan(
    model: PreTrainedModel,
    settings: Training,
    examples: Sequence[Example],
    micro_batch_tokens: int | Literal["auto"],
    gradient_checkpointing: bool | Literal["auto"],
    rows: Rows,
) -> Plan:
    """What "auto" is here; raises UserError when what is asked for, or anything, does not fit."""
    longest = max(row_tokens(example, rows) for example in examples)
    if any(os.environ.get(name, "false").lower() == "true" for name in SPREAD):
        tokens = 4096 if micro_batch_tokens == "auto" else micro_batch_tokens
        return Plan(tokens, gradient_checkpointing is not False)
    free = free_bytes(model.device)
    if model.device.type == "cpu":  # processes of one machine share it
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needs = count(model, settings, examples, rows)
    return choose(needs, free, longest, micro_batch_tokens, gradient_checkpointing, model.device)


def agreed(plans: Sequence[Plan]) -> Plan:
    """The plan of processes that tune one policy together, of which one may have less memory: they must cut a step into
    equally many micro-batches."""
    return Plan(min(p.micro_batch_tokens for p in plans), any(p.gradient_checkpointing for p in plans))


def choose(
    needs: Needs,
    free: int,
    longest: int,
    micro_batch_tokens: int | Literal["auto"],
    gradient_checkpointing: bool | Literal["auto"],
    device: torch.device = CPU,
) -> Plan:
    """The plan for these needs, when `free` bytes are free and the longest row has `longest` tokens."""
    asked = longest if micro_batch_tokens == "auto" else max(longest, micro_batch_tokens)
    choices = (False, True) if gradient_checkpointing == "auto" else (gradient_checkpointing,)
    room = free * MARGIN if micro_batch_tokens == "auto" or gradient_checkpointing == "auto" else free
    for checkpointing in choices:
        if needs.of(asked, checkpointing) <= room:
            if micro_batch_tokens != "auto":
                return Plan(micro_batch_tokens, checkpointing)
            each = needs.of(1, checkpointing) - needs.once
            most = MOST_ON_A_GPU if device.type == "cuda" else MOST_TOKENS
            return Plan(max(longest, min(most, int((room - needs.once) / each))), checkpointing)
    raise UserError(_misfit(needs, free, longest, asked, choices[-1], device))


def _misfit(
    needs: Needs, free: int, longest: int, asked: int, checkpointing: bool, device: torch.device
) -> str:
    choice = "with" if checkpointing else "without"
    needed = (
        f"tuning needs about {gib(needs.of(asked, checkpointing))} beside the weights for micro-batches of {asked:,} "
        f"tokens {choice} gradient checkpointing, and {free_text(device, free)}"
    )
    if needs.of(longest, checkpointing) <= free:
        fits = int((free * MARGIN - needs.once) / (needs.of(1, checkpointing) - needs.once))
        return f"{needed}: expected runtime.micro_batch_tokens of at most {max(longest, fits):,} (or 'auto')"
    if not checkpointing and needs.of(longest, True) <= free:
        return f"{needed}: expected runtime.gradient_checkpointing = true (or 'auto')"
    return (
        f"{needed}, and the longest pair alone takes {longest:,}: expected a smaller training.max_tokens, fewer "
        f"trained weights (training.lora.rank, training.full), a smaller model or more memory"
    )


def count(model: PreTrainedModel, settings: Training, examples: Sequence[Example], rows: Rows) -> Needs:
    """What tuning takes, from one forward of one pair; the model is as before afterwards."""
    enough = [example for example in examples if row_tokens(example, rows) >= PROBE_TOKENS]
    probe = min(enough, key=lambda e: e.num_tokens) if enough else max(examples, key=lambda e: e.num_tokens)
    was_training, weights = model.training, model.num_parameters()
    policy: Any = trainable(model, settings, 0)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    with torch.random.fork_rng(), switched_off(noise_of(policy)):
        policy.train()
        saved, tokens, logits = _saved_bytes(policy, probe, rows)
    once = trained * STATE_BYTES
    if settings.full:
        # weights in float32, and for half precision autocast's copies of them
        once += weights * 4 if model.dtype.itemsize == 2 else 0
    else:
        once += trained * 4  # the adapters
        without_adapter(policy)
    model.train(was_training)
    config = model.config.get_text_config()
    inner = max(0.0, saved - logits)
    kept = tokens * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    # a layer's own are there once more while it is computed again, and about as much of gradients
    again = logits + kept + 2 * inner / config.num_hidden_layers
    return Needs(once, (saved + logits) / tokens, (again + logits) / tokens)


def _saved_bytes(policy: Any, probe: Example, rows: Rows) -> tuple[int, int, int]:
    """What autograd keeps of a forward, its tokens, and how much of it is logits (whose gradient is as large)."""
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    vocabulary = policy.config.get_text_config().vocab_size
    # the storages themselves: one that is freed would lend its address to the next
    kept: dict[int, torch.UntypedStorage] = {}
    logits: set[int] = set()

    def keep(tensor: Tensor) -> None:
        """Keeps and hands back no tensor: a step that saves its own result would hold itself, and the weights, for
        good."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place in own:
            return
        kept[place] = storage
        if tensor.ndim and tensor.shape[-1] == vocabulary:
            logits.add(place)

    batch = collate([probe], rows=rows).to(policy.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        completion_logps(policy, batch).sum()
    sizes = {place: storage.nbytes() for place, storage in kept.items()}
    return sum(sizes.values()), batch.input_ids_BT.numel(), sum(sizes[place] for place in logits)


def trained_parameters(model: PreTrainedModel, settings: Training) -> int:
    """How many numbers are trained; the model may be weightless, and is as before afterwards. Raises `UserError` when
    the adapters cannot be put on it."""
    policy: Any = trainable(model, settings, 0)
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    if not settings.full:
        without_adapter(policy)
    return trained


def check_weights(needed: int, device: torch.device, model: str) -> None:
    """Raise UserError when a policy's weights alone are more than is free: loading it would bring the machine down."""
    free = free_bytes(device)
    if needed > free:
        raise UserError(
            f"policy.model = '{model}' has weights of {gib(needed)}, and {free_text(device, free)}: "
            f'expected a smaller model, policy.dtype = "bfloat16" or more memory'
        )
