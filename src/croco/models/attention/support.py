"""Which models our own attention computes exactly: known kinds of layers and positions, and a trial that has to agree.

The others take slower ways that leave everything to transformers. A trial reaches past every length at which, by its
config, a model changes what it computes (a sliding window, another scaling of positions), as far as it is used.
"""

from collections.abc import Mapping
from typing import Any

import torch

from croco.models.decoder import Decoder
from croco.models.protocols import Decoding, Request

_LAYERS = {"full_attention", "sliding_attention"}
_ROPE = {"default", "linear", "llama3", "yarn"}
_ROPE_OF_LENGTH = {"longrope", "dynamic"}  # angles that follow from the longest row of a batch
_UNKNOWN = ("attn_logit_softcapping", "attention_sinks", "alibi", "q_lora_rank", "kv_lora_rank")
_BOUNDARIES = ("sliding_window", "attention_chunk_size", "original_max_position_embeddings", "window_size")
_STEPS = 4  # tokens of a trial, which begins just before a boundary
TRIAL_TOKENS = 512  # boundaries up to here are tried when a model is opened, longer ones once they are met


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


def depends_on_batch(config: Any) -> bool:
    """Whether a row's numbers change with the longest row beside it, so that it must be computed alone."""
    return bool(_rope_types(config.get_text_config()) & _ROPE_OF_LENGTH)


def boundaries(config: Any) -> list[int]:
    """Lengths in tokens at which the model changes what it computes, ascending."""
    text = config.get_text_config()
    places = [text.to_dict(), *(part for part in _rope_parts(text))]
    found = {place[name] for place in places for name in _BOUNDARIES if isinstance(place.get(name), int)}
    return sorted(length for length in found if length > 0)


def trial_lengths(config: Any, reach: int) -> list[int]:
    """Lengths of prompts for a trial: short ones, and one on either side of every boundary up to `reach`."""
    met = [length for length in boundaries(config) if length <= reach]
    around = (length + extra for length in met for extra in (2 - _STEPS, 3))
    return sorted({5, 9, *(length for length in around if length > 0)})


def disagreement(model: Any, reach: int = TRIAL_TOKENS) -> str | None:
    """None when prompts decoded together give the distributions of plain forwards on this very model, else why not.

    Compared is the expected difference of log-probabilities: rounding makes it 1e-6 in float32, and in bfloat16 what
    transformers' own cache makes it; a prompt that is not seen makes it large.
    """
    vocabulary = model.config.get_text_config().vocab_size
    prompts = [
        [(7 * i + 3) % vocabulary for i in range(length)] for length in trial_lengths(model.config, reach)
    ]
    try:
        with torch.inference_mode():
            fast, slow, noise = _three_ways(model, prompts)
    except Exception as error:  # noqa: BLE001 (a trial runs the code of any architecture)
        return f"a trial of shared prompts fails ({_first_line(error)})"
    gap = (slow.exp() * (fast - slow).abs()).sum(-1).max().item()
    if gap < allowed_gap(model.dtype, noise):
        return None
    return f"its log-probabilities differ by {gap:.2g} from a plain forward's on a trial prompt"


def allowed_gap(dtype: torch.dtype, noise: float) -> float:
    """The difference that passes for rounding, where two ways of transformers differ by `noise`."""
    return 1e-3 if dtype == torch.float32 else max(0.02, 4 * noise)


def _three_ways(model: Any, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Log-probabilities (rows and steps, V) of the decoder and of plain forwards, and how far a cached forward is."""
    requests = [Request(i, prompt, [1, 2]) for i, prompt in enumerate(prompts)]
    decoding = Decoding(1.0, 1.0, 0, 2 * _STEPS)
    rows = 2 * len(prompts)
    budget = rows * (2 * _STEPS + max(map(len, prompts)))
    decoder = Decoder(model, set(), decoding, requests, 10**9, budget)
    decoder._refill()
    fast = [decoder._step().float().log_softmax(-1) for _ in range(_STEPS)]
    fast_rows, slow_rows, noise = [], [], 0.0
    for row, (i, _) in enumerate(decoder.row_of.tolist()):
        drawn = decoder.written[row, :_STEPS].tolist()
        whole = torch.tensor([prompts[i] + drawn], device=model.device)
        slow = model(input_ids=whole, use_cache=False).logits[0, -_STEPS:].float().log_softmax(-1)
        slow_rows.append(slow)
        fast_rows.append(torch.stack([step[row] for step in fast]))
        if model.dtype != torch.float32 and row % 2 == 0:
            start = model(input_ids=whole[:, :-_STEPS], use_cache=True)
            cached = model(
                input_ids=whole[:, -_STEPS:], past_key_values=start.past_key_values, use_cache=True
            )
            logps = cached.logits[0].float().log_softmax(-1)
            noise = max(noise, (slow.exp() * (logps - slow).abs()).sum(-1).max().item())
    return torch.cat(fast_rows), torch.cat(slow_rows), noise


def _rope_parts(config: Any) -> list[Mapping[str, Any]]:
    """What a config says of its rotary positions, which may differ between kinds of layers."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, Mapping))]


def _rope_types(config: Any) -> set[str]:
    return {str(part.get("rope_type", "default")) for part in _rope_parts(config)}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__} {(str(error).strip().splitlines() or [''])[0][:200]}".strip()
