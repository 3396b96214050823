"""Memory of models in process: what is free, what a model is going to need, and going on with less when it runs out.

The needs are estimates from the architecture's numbers, without fragmentation and what the libraries keep."""

import ctypes
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import torch

from croco.errors import UserError, one_line

logger = logging.getLogger(__name__)
NF4_BYTES = 0.516  # of a number in four bits, its share of the scales included


def buckets(lengths: Sequence[int], token_budget: int) -> Iterator[slice]:
    """Slices of ascending lengths whose padded size stays under the budget and which hold little padding: the longest
    is at most a quarter and 8 tokens longer than the shortest. A length over the budget is a slice of its own."""
    start = 0
    while start < len(lengths):
        end = start + 1
        while (
            end < len(lengths)
            and lengths[end] <= 1.25 * lengths[start] + 8
            and lengths[end] * (end + 1 - start) <= token_budget
        ):
            end += 1
        yield slice(start, end)
        start = end


def give_back() -> None:
    """Give back what is reserved and not used, which nobody else sees as free: by torch on the GPU, by glibc in this
    process, which otherwise keeps most of what a model and its activations took."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on a device."""
    give_back()
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def free_text(device: torch.device, free: int) -> str:
    """What is free on a device, for a person; on a GPU of how much, since another process may hold the rest."""
    whole = f" of {gib(torch.cuda.mem_get_info(device)[1])}" if device.type == "cuda" else ""
    return f"{gib(free)}{whole} are free on {device}"


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def weights_bytes(network: Any, itemsize: int, quantization: str | None = None) -> int:
    """What a model's weights take; in four bits those of linear layers but the head."""
    whole, head = network.num_parameters(), network.get_output_embeddings()
    linear = (m.weight.numel() for m in network.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    small = sum(linear) if quantization else 0
    return int((whole - small) * itemsize + small * NF4_BYTES)


def sampling_bytes(config: Any, itemsize: int, token_budget: int, max_new_tokens: int) -> int:
    """What sampling takes beside the weights: keys and values of the budget, a prefill, and the logits of its rows."""
    vocabulary, rows = config.get_text_config().vocab_size, max(1, token_budget // max_new_tokens)
    logits = rows * vocabulary * (itemsize + 8)  # and two copies in float32
    return token_budget * _cached(config, itemsize) + max(logits, token_budget * _computed(config, itemsize))


def scoring_bytes(config: Any, itemsize: int, token_budget: int) -> int:
    """What scoring takes beside the weights: the stored prompts, and a batch of as many tokens."""
    return token_budget * (_cached(config, itemsize) + _computed(config, itemsize))


def _cached(config: Any, itemsize: int) -> int:
    """Bytes of a token's keys and values in all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width * itemsize)


def _computed(config: Any, itemsize: int) -> int:
    """Bytes of a token within one layer: about ten tensors of the hidden width and six of the MLP's (measured)."""
    text = config.get_text_config()
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return int((10 * text.hidden_size + 6 * inner) * itemsize)


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or (where torch and the system only say so in words) on a CPU."""
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in message


def halve_budget(engine: Any, error: RuntimeError, least: int) -> None:
    """Halve the engine's token budget if memory ran out and there is something to halve; else raise."""
    if not out_of_memory(error):
        raise error
    if engine.token_budget <= least:
        raise UserError(
            f"{engine.name}: a single row does not fit in memory ({one_line(error)}): expected no other process "
            f"there, or a smaller model"
        ) from error
    engine.token_budget //= 2
    logger.warning("%s: out of memory, going on with a budget of %d tokens", engine.name, engine.token_budget)


def with_less_memory(engine: Any, compute: Callable[[int], list[list[float]]]) -> list[list[float]]:
    """Compute with the engine's token budget, halving it for as long as memory runs out."""
    while True:
        try:
            return compute(engine.token_budget)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            halve_budget(engine, error, least=1)
