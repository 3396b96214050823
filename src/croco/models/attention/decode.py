"""Attention of one new token per row over a prompt's keys, stored once, and the row's own keys.

Rows of one prompt read its keys in one matrix product; the scores over prompt and own tokens meet in one softmax, so
the result is ordinary attention. It is plugged into transformers as an attention function with a cache of its own.
Leaves out what such a function cannot see: soft-capping, attention sinks, biases (`support.unsupported` says so).

Shapes: R rows, G prompts, N most rows of one prompt, H key-value heads, Q query heads per key-value head, P prompt
tokens (padded), C own tokens (capacity), D head dimension."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from croco.models.attention.support import refuse_unknown

NAME = "croco_shared_prefix"


@dataclass
class Layout:
    """Which row belongs to which prompt, and what each may see in this step."""

    prefix_keys: list[torch.Tensor]  # per layer (G, H, D, P): transposed, as the product wants it
    prefix_values: list[torch.Tensor]  # per layer (G, H, P, D)
    gather_GN: torch.Tensor  # (G·N,) the row at each place of a prompt; places without a row name row 0
    place_R: torch.Tensor  # (R,) the place of each row
    prompt_tokens_R: torch.Tensor
    age_R: torch.Tensor  # own tokens before this one, which is written at this column
    capacity: int
    biases: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def bias(self, window: int | None) -> torch.Tensor:
        """0 where a row may look, −inf elsewhere, float32 (R, 1, 1, P + C); computed once per step and window."""
        if window not in self.biases:
            device = self.age_R.device
            prompt = torch.arange(self.prefix_values[0].shape[2], device=device)
            own = torch.arange(self.capacity, device=device)
            length_R1, age_R1 = self.prompt_tokens_R[:, None], self.age_R[:, None]
            see_prompt, see_own = prompt < length_R1, own <= age_R1
            if window is not None:
                see_prompt &= prompt > length_R1 + age_R1 - window
                see_own &= own > age_R1 - window
            see = torch.cat([see_prompt, see_own], dim=1)
            bias = torch.zeros(see.shape, device=device).masked_fill_(~see, float("-inf"))
            self.biases[window] = bias[:, None, None, :]
        return self.biases[window]


class OwnKeys:
    """The rows' own keys and values, (R, H, C, D) per layer: what the model takes for its cache in a decoding step."""

    is_compileable = False

    def __init__(self, num_rows: int, capacity: int) -> None:
        self.num_rows, self.capacity = num_rows, capacity
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.write_at: torch.Tensor | None = None  # (R·H,) flat places of this step's column

    def begin(self, age_R: torch.Tensor) -> None:
        """Say at which column each row writes in the coming step."""
        self.age_R, self.write_at = age_R, None

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one column per row and return the whole buffers (transformers' Cache protocol)."""
        rows, heads, _, width = key.shape
        if layer_idx == len(self.keys):  # zeros: what is masked must still be finite
            self.keys.append(key.new_zeros(rows, heads, self.capacity, width))
            self.values.append(value.new_zeros(rows, heads, self.capacity, value.shape[-1]))
        if self.write_at is None:
            line = torch.arange(rows * heads, device=key.device).view(rows, heads) * self.capacity
            column_R = self.age_R.clamp_max(
                self.capacity - 1
            )  # the age of a free slot still grows, without effect
            self.write_at = (line + column_R[:, None]).view(-1)
        for buffer, new in ((self.keys[layer_idx], key), (self.values[layer_idx], value)):
            buffer.view(-1, buffer.shape[-1]).index_copy_(0, self.write_at, new.reshape(rows * heads, -1))
        return self.keys[layer_idx], self.values[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen; positions and masks are always given, so no model reads more than this from it."""
        return 0

    def grow(self, capacity: int) -> None:
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                buffers[layer] = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                buffers[layer][:, :, : old.shape[2]] = old
        self.capacity = capacity

    def keep(self, rows: torch.Tensor) -> None:
        self.keys = [buffer.index_select(0, rows) for buffer in self.keys]
        self.values = [buffer.index_select(0, rows) for buffer in self.values]
        self.num_rows = len(rows)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # (R, H·Q, 1, D)
    key: torch.Tensor,  # (R, H, C, D)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    shared_prefix: Layout,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Exact attention over prompt and own tokens; returns (R, 1, H·Q, D), as transformers expects."""
    refuse_unknown(kwargs)
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys_GHDP, values_GHPD = shared_prefix.prefix_keys[layer], shared_prefix.prefix_values[layer]
    prompts, heads, width, prompt_tokens = keys_GHDP.shape
    rows, per_head = query.shape[0], query.shape[1] // heads
    places = len(shared_prefix.gather_GN) // prompts

    def to_prompts(x_RHQX: torch.Tensor) -> torch.Tensor:
        """Rows gathered by prompt: (R, H, Q, X) → (G·H, N·Q, X)."""
        gathered = x_RHQX.index_select(0, shared_prefix.gather_GN).view(prompts, places, heads, per_head, -1)
        return gathered.transpose(1, 2).reshape(prompts * heads, places * per_head, -1)

    def to_rows(x: torch.Tensor) -> torch.Tensor:
        """The way back: (G·H, N·Q, X) → (R, H, Q, X)."""
        by_place = x.view(prompts, heads, places, per_head, -1).transpose(1, 2)
        return by_place.reshape(prompts * places, heads, per_head, -1).index_select(0, shared_prefix.place_R)

    scaled_RHQD = query.view(rows, heads, per_head, width) * (width**-0.5 if scaling is None else scaling)
    own = torch.bmm(
        scaled_RHQD.view(rows * heads, per_head, width), key.view(rows * heads, -1, width).transpose(1, 2)
    )
    prompt = torch.bmm(to_prompts(scaled_RHQD), keys_GHDP.view(prompts * heads, width, prompt_tokens))
    scores = torch.cat([to_rows(prompt), own.view(rows, heads, per_head, -1)], dim=-1)
    weights = (scores.float() + shared_prefix.bias(sliding_window)).softmax(-1).to(value.dtype)
    weights_prompt, weights_own = weights.split([prompt_tokens, key.shape[2]], dim=-1)
    out = torch.bmm(
        weights_own.reshape(rows * heads, per_head, -1), value.view(rows * heads, -1, value.shape[-1])
    )
    from_prompt = torch.bmm(to_prompts(weights_prompt), values_GHPD.view(prompts * heads, prompt_tokens, -1))
    out = out.view(rows, heads, per_head, -1) + to_rows(from_prompt)
    return out.view(rows, 1, heads * per_head, -1), None


AttentionInterface.register(NAME, attend)


@contextmanager
def plugged_in(model: Any, name: str = NAME) -> Iterator[None]:
    """Within it, the model's attention is the one registered under the name, for which transformers makes no mask."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, earlier in before:
            config._attn_implementation = earlier
