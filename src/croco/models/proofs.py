"""Trials on the loaded model: our own ways of sampling and scoring must give what transformers' forward gives.

A trial reaches past every length at which, by its config, the model changes what it computes (a sliding window, another
scaling of positions). Whatever a trial raises is a reason for the slower way, never an error."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from croco.errors import one_line
from croco.models.attention.rows import no_varlen
from croco.models.attention.support import boundaries, unsupported
from croco.models.decoder import ContinuousBatchDecoder
from croco.models.prefix_forward import Group, Way, forward
from croco.models.protocols import Decoding, Request

TRIAL_TOKENS = 512  # boundaries up to here are tried when a model is opened, longer ones once they are met
_STEPS = 4  # tokens of a trial, which begins just before a boundary


def trial_lengths(config: Any, reach: int) -> list[int]:
    """Lengths of prompts for a trial: short ones, and one on either side of every boundary up to `reach`."""
    met = [length for length in boundaries(config) if length <= reach]
    around = (length + extra for length in met for extra in (2 - _STEPS, 3))
    return sorted({5, 9, *(length for length in around if length > 0)})


def decoder_disagrees(model: Any, reach: int = TRIAL_TOKENS) -> str | None:
    """None when prompts decoded together give the distributions of plain forwards on this very model, else why not.
    Compared is the expected difference of log-probabilities: 1e-6 by rounding in float32, in half precision what the
    last bit of the embeddings makes in a plain forward (0.03 to 0.1; in nine tokens a place off by one makes 0.15 and
    more)."""
    vocabulary = model.config.get_text_config().vocab_size
    prompts = [
        [(7 * i + 3) % vocabulary for i in range(length)] for length in trial_lengths(model.config, reach)
    ]
    try:
        with torch.inference_mode():
            fast, slow, noise = _three_ways(model, prompts)
    except Exception as error:  # noqa: BLE001 (a trial runs the code of any architecture)
        return f"a trial of shared prompts fails ({type(error).__name__} {one_line(error)})"
    gap = (slow.exp() * (fast - slow).abs()).sum(-1).max().item()
    if gap < (1e-3 if model.dtype == torch.float32 else max(0.02, 2 * noise)):
        return None
    return f"its log-probabilities differ by {gap:.2g} from a plain forward's on a trial prompt"


def _three_ways(model: Any, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Log-probabilities (rows and steps, V) of the decoder and of plain forwards, and in half precision how far those
    move with the last bit of the embeddings."""
    requests = [Request(i, prompt, [1, 2]) for i, prompt in enumerate(prompts)]
    decoding = Decoding(1.0, 1.0, 0, 2 * _STEPS)
    rows = 2 * len(prompts)
    budget = rows * (2 * _STEPS + max(map(len, prompts)))
    decoder = ContinuousBatchDecoder(model, set(), decoding, requests, 10**9, budget)
    decoder._refill()
    fast = [decoder._step().float().log_softmax(-1) for _ in range(_STEPS)]
    fast_rows, slow_rows, noise = [], [], 0.0
    for row, (i, _) in enumerate(decoder.row_of.tolist()):
        drawn = decoder.written[row, :_STEPS].tolist()
        whole = torch.tensor([prompts[i] + drawn], device=model.device)
        slow = _last_logps(model, whole)
        slow_rows.append(slow)
        fast_rows.append(torch.stack([step[row] for step in fast]))
        if model.dtype != torch.float32 and row % 2 == 0:
            with _last_bit_moved(model):
                logps = _last_logps(model, whole)
            noise = max(noise, (slow.exp() * (logps - slow).abs()).sum(-1).max().item())
    return torch.cat(fast_rows), torch.cat(slow_rows), noise


def _last_logps(model: Any, ids_1T: torch.Tensor) -> torch.Tensor:
    """Of the last tokens, (steps, V): those of a whole prompt at a late boundary would be gigabytes."""
    logits: torch.Tensor = model(input_ids=ids_1T, use_cache=False, logits_to_keep=_STEPS).logits
    return logits[0].float().log_softmax(-1)


@contextmanager
def _last_bit_moved(model: Any) -> Iterator[None]:
    """Within it, every number of the embeddings is a unit of its last place higher or lower, always the same ones."""

    def move(_: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        coins = torch.rand(output.shape, generator=torch.Generator().manual_seed(0)).to(output.device) < 0.5
        bit = torch.finfo(output.dtype).eps
        return output * torch.where(coins, 1 + bit, 1 - bit).to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def scoring_way(network: Any, reach: int = TRIAL_TOKENS) -> tuple[Way, str | None]:
    """The fastest way to score that is exact on this very network, and why it is not a faster one that this machine
    has."""
    if (reason := unsupported(network)) is not None:
        return "whole", reason
    if network.config._attn_implementation != "sdpa":
        return "whole", f"its attention is {network.config._attn_implementation}, not SDPA"
    lacks = no_varlen(network.device, network.dtype)
    reason = lacks or prefixes_disagree(network, reach, "packed")
    if reason is None:
        return "packed", None
    if whole := prefixes_disagree(network, reach, "stored"):
        return "whole", whole
    return "stored", None if lacks and network.device.type != "cuda" else reason


@torch.inference_mode()
def prefixes_disagree(network: Any, reach: int = TRIAL_TOKENS, way: Way = "stored") -> str | None:
    """None when prefixes shared in this way give on a trial what whole sequences give on this very network, else why
    not. Compared is the relative difference at the last token: 1e-6 by rounding in float32, a hundredth in bfloat16."""
    vocabulary = network.config.get_text_config().vocab_size
    groups = [
        Group([(7 * i + length) % vocabulary for i in range(length)], [[5, 6, 7], [8], [9, 4]])
        for length in trial_lengths(network.config, reach)
    ]
    last = [[2, 0, 1]] * len(groups)

    def outputs(way: Way) -> torch.Tensor:
        rows = {
            (g, i): output[0][line, last[g][i]].double()
            for batch, output in forward(network, groups, 64, way, last)
            for line, (g, i) in enumerate(batch)
        }
        return torch.stack([rows[row] for row in sorted(rows)])

    try:
        fast, slow = outputs(way), outputs("whole")
    except Exception as error:  # noqa: BLE001 (a trial runs the code of any architecture)
        return f"a trial of shared prefixes fails ({type(error).__name__} {one_line(error)})"
    gap = ((fast - slow).norm() / slow.norm()).item()
    if gap > (1e-3 if network.dtype == torch.float32 else 0.1):
        return f"with shared prefixes a trial differs by {gap:.2g} from whole sequences"
    return None  # broken weights give NaN either way: that is for the reader of the scores to name
