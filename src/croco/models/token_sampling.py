"""Drawing tokens from logits: a counter-based stream of uniforms per sample, and the inverse of the distribution.

The uniform of a sample's step is a hash of (seed, step), so a draw does not know which batch it is in. Logits may
differ in their last bits with the shape of a batch: two batchings agree unless a uniform falls within that rounding of
a boundary. Leaves out repetition penalties, min-p and beams.

Shapes: R rows, V vocabulary, K tokens left after truncation."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from croco.errors import UserError
from croco.models.protocols import Decoding

# splitmix64 (Steele, Lea, Flood 2014); its unsigned constants written as the int64 of the same bits.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_BLOCK = 64


def uniforms(seeds_R: torch.Tensor, steps_R: torch.Tensor) -> torch.Tensor:
    """Uniforms in [0, 1 − 2⁻⁵²], float64 (R,), from int64 seeds and step counts: splitmix64 of seed + (step + 1)·γ."""
    z_R = seeds_R + (steps_R + 1) * _GAMMA  # int64 wraps around, as unsigned arithmetic would
    z_R = (z_R ^ _shift(z_R, 30)) * _MIX_1
    z_R = (z_R ^ _shift(z_R, 27)) * _MIX_2
    z_R = z_R ^ _shift(z_R, 31)
    return _shift(z_R, 12).to(torch.float64) * 2.0**-52


def draw(
    logits_RV: torch.Tensor, seeds_R: torch.Tensor, steps_R: torch.Tensor, decoding: Decoding
) -> torch.Tensor:
    """One token id per row, int64 (R,): argmax at temperature 0, else inverse CDF after temperature, top-k, top-p. A
    row with a NaN, an infinity or no possible token gets −1, on which `tokens_drawn` raises."""
    if logits_RV.device.type == "mps":  # which has no float64
        drawn_R = draw(logits_RV.cpu(), seeds_R.cpu(), steps_R.cpu(), decoding)
        return drawn_R.to(logits_RV.device)
    if decoding.temperature == 0:
        top_R, token_R = logits_RV.max(-1)
        return torch.where(top_R.isfinite(), token_R, -1)
    scaled_RV = logits_RV.float()
    if decoding.temperature != 1:
        scaled_RV = scaled_RV / decoding.temperature
    u_R = uniforms(seeds_R, steps_R)
    if decoding.top_k == 0 and decoding.top_p >= 1:
        return _invert(scaled_RV, u_R)
    return _invert_truncated(scaled_RV, u_R, decoding)


def tokens_drawn(model: Any, token_R: torch.Tensor) -> np.ndarray:
    """The drawn tokens on the host; raises UserError when the model gave no probabilities to draw one from."""
    tokens: np.ndarray = token_R.cpu().numpy()
    if (tokens < 0).any():
        raise UserError(
            f"model {model.name_or_path!r}: found logits that are not finite numbers, expected whole weights and a "
            f"type that holds its activations (it computes in {str(model.dtype).removeprefix('torch.')})"
        )
    return tokens


def _invert(scaled_RV: torch.Tensor, u_R: torch.Tensor) -> torch.Tensor:
    """Inverse CDF over the whole vocabulary in two levels, blocks and then tokens: no cumulative sum over V. The
    position within a block is a fraction of its mass strictly below 1, so the token always has a positive probability.
    """
    vocabulary = scaled_RV.shape[1]
    padded_RV = F.pad(scaled_RV, (0, -vocabulary % _BLOCK), value=float("-inf"))
    mass_RBK = padded_RV.sub_(scaled_RV.amax(-1, keepdim=True)).exp_().view(len(u_R), -1, _BLOCK)
    cdf_RB = mass_RBK.sum(-1).to(torch.float64).cumsum(-1)
    target_R1 = (u_R * cdf_RB[:, -1]).unsqueeze(1)
    block_R1 = torch.searchsorted(cdf_RB, target_R1, right=True).clamp_max(
        cdf_RB.shape[1] - 1
    )  # of NaN: the end
    upper_R1 = cdf_RB.gather(1, block_R1)
    lower_R1 = torch.where(block_R1 > 0, cdf_RB.gather(1, (block_R1 - 1).clamp_min(0)), 0.0)
    fraction_R1 = ((target_R1 - lower_R1) / (upper_R1 - lower_R1)).clamp(0.0, 1.0 - 2.0**-52)
    inside_RK = (
        mass_RBK[torch.arange(len(u_R), device=u_R.device), block_R1[:, 0]].to(torch.float64).cumsum(-1)
    )
    token_R1 = torch.searchsorted(inside_RK, fraction_R1 * inside_RK[:, -1:], right=True)
    return torch.where(cdf_RB[:, -1].isfinite(), (block_R1 * _BLOCK + token_R1)[:, 0], -1)


def _invert_truncated(scaled_RV: torch.Tensor, u_R: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """Inverse CDF over the top-k tokens, then the smallest set of them whose mass reaches top-p (the first always)."""
    size = min(decoding.top_k, scaled_RV.shape[1]) if decoding.top_k else scaled_RV.shape[1]
    top_RK, ids_RK = scaled_RV.topk(size) if decoding.top_k else scaled_RV.sort(descending=True)
    mass_RK = top_RK.to(torch.float64).softmax(-1)
    before_RK = mass_RK.cumsum(-1) - mass_RK
    keep_RK = before_RK < decoding.top_p
    keep_RK[:, 0] = True
    cdf_RK = torch.where(keep_RK, mass_RK, 0.0).cumsum(-1)
    place_R1 = torch.searchsorted(cdf_RK, (u_R * cdf_RK[:, -1]).unsqueeze(1), right=True)
    token_R = ids_RK.gather(1, place_R1.clamp_max(cdf_RK.shape[1] - 1))[:, 0]
    return torch.where(cdf_RK[:, -1].isfinite(), token_R, -1)


def _shift(z_R: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right: int64's own shift copies the sign."""
    return (z_R >> bits) & ((1 << (64 - bits)) - 1)
