"""Draws against slow twins: splitmix64 in Python integers, the inverse CDF by a loop, and the distribution itself."""

import math

import pytest
import torch

from croco.models.protocols import Decoding
from croco.models.token_sampling import draw, uniforms

FULL = Decoding(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=1)


def splitmix(seed: int, step: int) -> float:
    """The twin of `uniforms`, on unsigned 64-bit integers."""
    mask = 2**64 - 1
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 12) * 2.0**-52


def slow_draw(logits: list[float], u: float, decoding: Decoding) -> int:
    """The twin of `draw`: sort only where there is something to cut, then walk along the CDF."""
    weights = [math.exp((x - max(logits)) / decoding.temperature) for x in logits]
    order = list(range(len(logits)))
    if decoding.top_k or decoding.top_p < 1:
        order.sort(key=lambda i: -weights[i])
        order = order[: decoding.top_k or None]
        total, kept, mass = sum(weights[i] for i in order), [], 0.0
        for i in order:
            if kept and mass >= decoding.top_p * total:
                break
            kept.append(i)
            mass += weights[i]
        order = kept
    target, reached = u * sum(weights[i] for i in order), 0.0
    for i in order:
        reached += weights[i]
        if reached > target:
            return i
    return order[-1]


def test_uniforms_equal_splitmix64():
    seeds = [0, 1, 2**63 - 1, 1234567890123456789]
    steps = [0, 1, 5, 4095]
    found = uniforms(torch.tensor(seeds).repeat_interleave(4), torch.tensor(steps).repeat(4)).tolist()
    assert found == [splitmix(seed, step) for seed in seeds for step in steps]
    assert splitmix(0, 0) == (0xE220A8397B1DCDAF >> 12) * 2.0**-52  # splitmix64's published first output


def test_uniforms_are_uniform_over_seeds_and_over_steps():
    many = torch.arange(200_000)
    for u in (uniforms(many, torch.zeros_like(many)), uniforms(torch.zeros_like(many) + 7, many)):
        assert abs(u.mean().item() - 0.5) < 0.003
        counts = torch.histc(u.float(), bins=50, min=0, max=1)
        assert ((counts - 4000) ** 2 / 4000).sum().item() < 95  # chi-square, 49 degrees of freedom, p = 1e-4


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.0, 0.8, 0), (1.3, 1.0, 7), (0.9, 0.7, 20)],
)
@pytest.mark.parametrize("vocabulary", [3, 64, 130])
def test_draw_equals_its_twin(temperature, top_p, top_k, vocabulary):
    decoding = Decoding(temperature, top_p, top_k, 1)
    torch.manual_seed(vocabulary)
    logits = 3 * torch.randn(300, vocabulary)
    seeds, steps = torch.arange(300) * 977, torch.arange(300) % 11
    u = uniforms(seeds, steps).tolist()
    expected = [slow_draw(row, x, decoding) for row, x in zip(logits.double().tolist(), u, strict=True)]
    assert draw(logits, seeds, steps, decoding).tolist() == expected


def test_draw_follows_the_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]]))
    rows = 40_000
    tokens = draw(logits.expand(rows, -1), torch.arange(rows), torch.zeros(rows, dtype=torch.long), FULL)
    expected = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]) * rows
    assert (
        (torch.bincount(tokens, minlength=5) - expected) ** 2 / expected
    ).sum().item() < 23.5  # 4 d.f., p = 1e-4


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((5000, 100), float("-inf"))
    logits[:, [3, 64, 99]] = 0.0
    tokens = draw(logits, torch.arange(5000), torch.zeros(5000, dtype=torch.long), FULL)
    assert set(tokens.tolist()) == {3, 64, 99}


def test_temperature_zero_is_argmax_whatever_the_seed():
    logits = torch.randn(50, 40)
    greedy = Decoding(temperature=0.0, top_p=0.5, top_k=3, max_new_tokens=1)
    drawn = draw(logits, torch.arange(50), torch.arange(50), greedy)
    assert drawn.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "decoding", [FULL, Decoding(0.0, 1.0, 0, 1), Decoding(0.7, 0.9, 5, 1), Decoding(1, 0.9, 0, 1)]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_marked_and_the_other_rows_are_drawn(decoding, bad):
    logits = torch.randn(4, 130)
    clean = draw(logits, torch.arange(4), torch.arange(4), decoding)
    logits[1, 70] = bad
    logits[3] = float("-inf")
    assert draw(logits, torch.arange(4), torch.arange(4), decoding).tolist() == [clean[0], -1, clean[2], -1]
