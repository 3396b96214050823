"""Log-probabilities of tokens from the hidden states, or the logits, that predict them.

Only the M positions that predict a wanted token meet the vocabulary, and in `head_logps` a few at a time: no (B, T, V)
or (M, V) tensor exists.

Shapes: B rows, T tokens, M wanted tokens of a batch, V vocabulary, D width."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Architectures (model_type) that do no more to their logits than `known_head` says.
HEADS = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "cohere", "cohere2", "granite", "olmo2",
    "phi3", "smollm3", "m2m_100",
)  # fmt: skip

# Logits held at a time: on a CPU what stays in its caches, on a GPU what fills it.
_LOGITS = {"cpu": 2**20, "cuda": 2**26}
_LEAST_ROWS = 32
_ALL_LOGITS = 2**27  # of a batch, where a head is not known and all exist at once: half a GiB in float32

# of hidden states (M, D), or logits (M, V), and targets (M,): (M,)
Logps = Callable[[Tensor, Tensor], Tensor]


def token_logps(logits_MV: Tensor, target_M: Tensor) -> Tensor:
    """Log-probability of each target token under its row of logits, (M,), in (-inf, 0]; in float32, because in bfloat16
    the sum over V loses the tail."""
    return -F.cross_entropy(logits_MV.float(), target_M, reduction="none")


def parted_logps(logits_MV: Tensor, target_M: Tensor) -> Tensor:
    """`token_logps` a few rows at a time: copies of all logits in float32 would be large."""
    parts = _parts(logits_MV.shape[1], logits_MV, target_M)
    return torch.cat([token_logps(*part) for part in parts])


def known_head(model: PreTrainedModel) -> Logps | None:
    """What stands for the output layer and what the model makes of its logits; None for architectures whose code has
    not been read, and for a layer that is adapted or spread over processes."""
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    if config.model_type not in HEADS or type(layer) is not nn.Linear:
        return None
    if layer.weight.dim() != 2 or isinstance(layer.weight, DTensor):
        return None
    scale = getattr(model, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)

    def logps(hidden_MD: Tensor, target_M: Tensor) -> Tensor:
        return head_logps(hidden_MD, layer.weight, layer.bias, target_M, scale=scale, cap=cap)

    return logps


@contextmanager
def read_out(model: Any) -> Iterator[Logps]:
    """Within it, the `logits` of the model's forward are for the function that is yielded, at the tokens wanted. Where
    the head is known they are the hidden states before it, (B, T, D), and logits of all tokens never exist."""
    base = unwrapped(model)
    head = known_head(base)
    if head is None:
        yield parted_logps
        return
    with head_at(base, None, whole=False) as kept:

        def give(_module: Any, _args: Any, output: Any) -> Any:
            output.logits = kept.pop()
            return output

        handle = model.register_forward_hook(give)  # of the wrapper: PEFT's calls no hook of the model in it
        try:
            yield head
        finally:
            handle.remove()


def bounded(token_budget: int, model: Any) -> int:
    """The token budget of a batch under `read_out`: less where all of its logits exist at once."""
    base = unwrapped(model)
    if known_head(base) is not None:
        return token_budget
    return min(token_budget, max(1, _ALL_LOGITS // int(base.config.get_text_config().vocab_size)))


@contextmanager
def head_at(model: PreTrainedModel, source_M: Tensor | None, whole: bool) -> Iterator[list[Tensor]]:
    """Gather the hidden states at some columns of the flattened (B * T) grid, (M, D), or all as they are, into the list
    that is yielded; the output layer sees them if `whole`, else one token."""
    gathered: list[Tensor] = []

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_ND = args[0].reshape(-1, args[0].shape[-1])
        gathered.append(args[0] if source_M is None else hidden_ND.index_select(0, source_M))
        return ((gathered[-1] if whole else hidden_ND[:1].detach())[None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield gathered
    finally:
        handle.remove()


def unwrapped(model: Any) -> PreTrainedModel:
    """The Hugging Face model inside wrappers (distributed ones keep it in `module`, PEFT offers it itself)."""
    while hasattr(model, "module"):
        model = model.module
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def head_logps(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_M: Tensor,
    *,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """`token_logps` of the logits cap * tanh(scale * (hidden weightᵀ + bias) / cap), (M,); without a cap no tanh.

    A few rows at a time. With a frozen head each row's gradient for its hidden state is computed at once and kept, (M,
    D); with a trained head the logits are computed again in the backward pass."""
    trained = weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
    if trained and torch.is_grad_enabled():

        def logps(hidden: Tensor, target: Tensor) -> Tensor:
            return token_logps(_logits(hidden, weight_VD, bias_V, scale, cap), target)

        parts = _parts(weight_VD.shape[0], hidden_MD, target_M)
        return torch.cat([checkpoint(logps, *part, use_reentrant=False) for part in parts])
    logps_M: Tensor = _FrozenHead.apply(hidden_MD, weight_VD, bias_V, target_M, scale, cap)
    return logps_M


def _parts(vocabulary: int, states_MX: Tensor, target_M: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A few rows of hidden states, or of logits, at a time."""
    rows = max(_LEAST_ROWS, _LOGITS.get(states_MX.device.type, 2**26) // vocabulary)
    return zip(states_MX.split(rows), target_M.split(rows), strict=True)


def _logits(
    hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scale: float, cap: float | None
) -> Tensor:
    logits_MV = F.linear(hidden_MD, weight_VD, bias_V)
    if scale != 1.0:
        logits_MV = logits_MV.float() * scale
    return logits_MV if cap is None else (logits_MV.float() / cap).tanh() * cap


class _FrozenHead(torch.autograd.Function):
    """d logp / d hidden = scale * ((one-hot - softmax) * (1 - (logits / cap)²)) weight, known once the logits are."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_M: Tensor,
        scale: float,
        cap: float | None,
    ) -> Tensor:
        slopes_MD = torch.empty_like(hidden_MD) if ctx.needs_input_grad[0] else None
        # in one piece: small ones, kept between the logits, leave gaps that the next logits do not fit in
        logps_M, start = hidden_MD.new_empty(len(target_M), dtype=torch.float32), 0
        for hidden, target in _parts(weight_VD.shape[0], hidden_MD, target_M):
            logits = _logits(hidden, weight_VD, bias_V, scale, cap)
            bend = None if cap is None or slopes_MD is None else 1 - (logits / cap).square()
            logps_MV = logits.log_softmax(1, dtype=torch.float32)
            del logits
            stop = start + len(target)
            logps_M[start:stop] = logps_MV.gather(1, target[:, None])[:, 0]
            if slopes_MD is not None:
                slope = logps_MV.exp_()  # its negative, which the backward pass turns round
                slope.scatter_add_(1, target[:, None], -torch.ones_like(logps_MV[:, :1]))
                if bend is not None:
                    slope *= bend
                if scale != 1.0:
                    slope *= scale
                slopes_MD[start:stop] = slope.to(weight_VD.dtype) @ weight_VD
            start = stop
        if slopes_MD is not None:
            ctx.save_for_backward(slopes_MD)
        return logps_M

    @staticmethod
    def backward(ctx: Any, gradient_M: Tensor) -> tuple[Tensor | None, ...]:
        (slopes_MD,) = ctx.saved_tensors
        return (-gradient_M[:, None].to(slopes_MD.dtype) * slopes_MD, None, None, None, None, None)
