"""Which models our own attention computes exactly: known kinds of layers and positions.

The others take slower ways that leave everything to transformers. `proofs` tries it on the loaded model.
"""

from collections.abc import Mapping
from typing import Any

import torch

_LAYERS = {"full_attention", "sliding_attention"}
_ROPE = {"default", "linear", "llama3", "yarn"}
_ROPE_OF_LENGTH = {"longrope", "dynamic"}  # angles that follow from the longest row of a batch
_UNKNOWN = ("attn_logit_softcapping", "attention_sinks", "alibi", "q_lora_rank", "kv_lora_rank")
_BOUNDARIES = ("sliding_window", "attention_chunk_size", "original_max_position_embeddings", "window_size")
# what models pass to an attention function beside queries, keys and values, and what changes no number here
_HARMLESS = {
    "dropout", "position_ids", "cache_position", "past_key_values", "use_cache", "is_causal", "output_attentions",
    "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep", "sliding_window",
    "position_embeddings", "layer_idx",
}  # fmt: skip


def unsupported(model: Any) -> str | None:
    """None when prefixes can be shared exactly with this architecture, else the reason why not."""
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if other := set(getattr(config, "layer_types", None) or ()) - _LAYERS:
        return f"it has layers of type {', '.join(sorted(other))}"
    if other := _rope_types(config) - _ROPE:
        return f"its positions are of type {', '.join(sorted(other))}"
    for name in _UNKNOWN:
        if getattr(config, name, None):
            return f"its attention has {name}"
    if not getattr(model, "_supports_attention_backend", False):
        return "its code takes no attention function"
    return None


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """Raise TypeError for an option that changes what attention computes and that ours does not know: attention sinks,
    caps, biases. The trials of `proofs` and `choose_rows` take it for a reason to go a slower way."""
    for name, value in options.items():
        if value is not None and name not in _HARMLESS:
            raise TypeError(f"our attention does not know the option {name}")


def depends_on_batch(config: Any) -> bool:
    """Whether a row's numbers change with the longest row beside it, so that it must be computed alone."""
    return bool(_rope_types(config.get_text_config()) & _ROPE_OF_LENGTH)


def forget_lengths(network: Any) -> None:
    """Give positions of the type "dynamic" the angles that they begin with: transformers keeps those of the longest
    sequence so far, so a row's numbers would depend on earlier ones."""
    for module in network.modules():
        for name, angles in list(module.named_buffers(recurse=False)):
            first = getattr(module, name.replace("inv_freq", "original_inv_freq"), None)
            if name.endswith("inv_freq") and "original" not in name and first is not None:
                with torch.inference_mode(
                    False
                ):  # a copy, since transformers writes into the buffer in place
                    module.register_buffer(name, first.clone().to(angles.device), persistent=False)
                longest = name.replace("inv_freq", "max_seq_len_cached")
                setattr(module, longest, module.original_max_seq_len)


def boundaries(config: Any) -> list[int]:
    """Lengths in tokens at which the model changes what it computes, ascending."""
    text = config.get_text_config()
    places = [text.to_dict(), *(part for part in _rope_parts(text))]
    lengths = {place[name] for place in places for name in _BOUNDARIES if isinstance(place.get(name), int)}
    return sorted(length for length in lengths if length > 0)


def _rope_parts(config: Any) -> list[Mapping[str, Any]]:
    """What a config says of its rotary positions, which may differ between kinds of layers."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, Mapping))]


def _rope_types(config: Any) -> set[str]:
    return {str(part.get("rope_type", "default")) for part in _rope_parts(config)}
