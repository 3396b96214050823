"""Which models our own masks and attention compute exactly: decoder-only, full or sliding-window layers, rotary or no
positions, and a trial that has to agree. The others take slower ways that leave everything to transformers."""

from typing import Any

import torch

from croco.models.decoder import Decoder
from croco.models.protocols import Decoding, Request

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


def disagreement(model: Any) -> str | None:
    """None when two prompts decoded together give the distributions of plain forwards on this very model, else why not.

    Compared is the expected difference of log-probabilities: rounding makes it 1e-6 in float32 and a few hundredths in
    bfloat16, a prompt that is not seen makes it large.
    """
    vocabulary = model.config.get_text_config().vocab_size
    prompts = [[(7 * i + 3) % vocabulary for i in range(length)] for length in (5, 9)]
    requests = [Request(i, prompt, [1, 2]) for i, prompt in enumerate(prompts)]
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.2
    with torch.inference_mode():
        decoder = Decoder(model, set(), Decoding(1.0, 1.0, 0, 4), requests, 64, 1024)
        decoder._refill()
        for _ in range(2):
            before = decoder.written[:, : int(decoder.count.max())].tolist()
            fast_RV = decoder._step().float().log_softmax(-1)
            for row, (i, _) in enumerate(decoder.row_of.tolist()):
                whole = torch.tensor([prompts[i] + before[row]], device=model.device)
                slow_V = model(input_ids=whole, use_cache=False).logits[0, -1].float().log_softmax(-1)
                gap = (slow_V.exp() * (fast_RV[row] - slow_V).abs()).sum().item()
                if not gap < tolerance:
                    return (
                        f"its log-probabilities differ by {gap:.2g} from a plain forward's on a trial prompt"
                    )
    return None
