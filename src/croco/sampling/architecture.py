"""Which architectures our own masks and attention compute exactly: decoder-only, full or sliding-window layers, rotary
or no positions. The others take slower ways that leave everything to transformers."""

from typing import Any

_KINDS = {"full_attention", "sliding_attention"}
_ROPE = {"default", "linear", "llama3", "yarn"}  # other kinds change the angles with the batch's longest row
_UNKNOWN = ("attn_logit_softcapping", "attention_sinks", "alibi", "q_lora_rank", "kv_lora_rank")


def unsupported(model: Any) -> str | None:
    """None when prefixes can be shared exactly with this architecture, else the reason why not."""
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if other := set(getattr(config, "layer_types", None) or ()) - _KINDS:
        return f"it has layers of type {', '.join(sorted(other))}"
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type", "default") not in _ROPE:
            return f"its positions are of type {part['rope_type']}"
    for name in _UNKNOWN:
        if getattr(config, name, None):
            return f"its attention has {name}"
    if not getattr(model, "_supports_attention_backend", False):
        return "its code takes no attention function"
    return None
