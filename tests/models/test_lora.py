"""The adapted layer in one step: PEFT's numbers, the same gradients, and dropout that is an honest Bernoulli draw."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn

from croco.models.lora import OneStepLinear
from croco.models.lora_layer import dropped_places, lora_linear


def layers(dtype=torch.float64, own=torch.float64, bias=True):
    """A layer of PEFT's with an adapter that is not the identity, and the same layer in one step."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5, bias=bias, dtype=dtype))
    config = LoraConfig(r=3, lora_alpha=12, lora_dropout=0.0, target_modules=["0"])
    adapted = get_peft_model(base, config, autocast_adapter_dtype=False).base_model.model[0]
    adapted.lora_A.to(own), adapted.lora_B.to(own)
    nn.init.normal_(adapted.lora_B["default"].weight)
    values = torch.randn(2, 4, 6, dtype=dtype)
    return adapted, values


def run(layer, values):
    values = values.clone().requires_grad_(True)
    out = layer(values)
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return [out, *torch.autograd.grad((out.float() ** 2).sum(), [values, *weights])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "own", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 2e-2),
        (torch.bfloat16, torch.bfloat16, 4e-2),
    ],
)
def test_output_and_gradients_are_peft_s(dtype, own, tolerance, bias):
    layer, values = layers(dtype, own, bias)
    want = run(layer, values)
    assert type(layer) is lora.Linear
    layer.__class__ = OneStepLinear
    found = run(layer, values)
    for mine, theirs in zip(found, want, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        scale = theirs.abs().max()
        torch.testing.assert_close(mine / scale, theirs / scale, rtol=0, atol=tolerance)


def test_gradients_under_dropout_are_those_of_finite_differences():
    weight, bias = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    variables = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 6), (3, 6), (5, 3))
    ]

    def function(values, a, b):
        torch.manual_seed(1)  # the same places at every call
        return lora_linear(values, weight, bias, a, b, 2.0, 0.4)

    assert torch.autograd.gradcheck(function, variables)


def test_dropout_is_of_what_the_adapter_sees_and_keeps_its_mean():
    torch.manual_seed(0)
    values, eye, zero = torch.ones(400, 50), torch.eye(50), torch.zeros(50, 50)
    out = lora_linear(values, zero, None, eye, eye, 1.0, 0.2)
    assert out.unique().tolist() == pytest.approx([0.0, 1.25])
    assert (out == 0).double().mean().item() == pytest.approx(0.2, abs=5 * (0.16 / out.numel()) ** 0.5)
    assert lora_linear(values, eye, None, eye, zero, 1.0, 0.2).equal(values)


@pytest.mark.parametrize("share", [0.02, 0.05, 0.5, 0.9])
def test_places_are_independent_draws(share):
    """Each of many draws of 64 places: the share, the variance of the count, and no pair more often than by chance."""
    torch.manual_seed(0)
    hit = torch.zeros(20_000, 64, dtype=torch.bool)
    for row in hit:
        row[dropped_places(64, share)] = True
    rate = hit.double().mean().item()
    assert rate == pytest.approx(share, abs=5 * (share * (1 - share) / hit.numel()) ** 0.5)
    assert hit.sum(1).double().var().item() == pytest.approx(64 * share * (1 - share), rel=0.05)
    together = torch.corrcoef(hit.double().T).fill_diagonal_(0)
    assert together.abs().max().item() < 6 / 20_000**0.5


def test_nothing_is_dropped_of_nothing():
    assert dropped_places(0, 0.5).numel() == 0
    assert dropped_places(100, 0.0).numel() == 0


def test_what_is_not_plain_goes_peft_s_way():
    layer, values = layers(torch.float32, torch.float32)
    layer.__class__ = OneStepLinear
    plain = layer(values)
    layer.merge()
    torch.testing.assert_close(layer(values), plain)
    layer.unmerge()
    layer.lora_dropout["default"] = nn.Dropout(1.0)
    assert layer.train()(values).equal(layer.base_layer(values))
    layer.enable_adapters(False)
    assert layer(values).equal(layer.base_layer(values))
    layer.enable_adapters(True)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(values).dtype == torch.bfloat16


def test_on_a_gpu_an_adapter_computes_in_the_type_of_its_input():
    """As autocast has it: weights in float32 cast where they are used, gradients in float32 again."""
    torch.manual_seed(0)
    x, weight = torch.randn(40, 24).bfloat16().requires_grad_(), torch.randn(16, 24).bfloat16()
    a, b = (torch.randn(shape).requires_grad_() for shape in ((4, 24), (16, 4)))
    upstream = torch.randn(40, 16).bfloat16()
    found = lora_linear(x, weight, None, a, b, 0.5, 0.0, on_gpu=True)
    ours = torch.autograd.grad(found, [x, a, b], upstream)
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.linear(x, weight) + 0.5 * F.linear(F.linear(x, a), b)
    theirs = torch.autograd.grad(plain, [x, a, b], upstream)
    assert found.dtype == torch.bfloat16
    assert [gradient.dtype for gradient in ours] == [torch.bfloat16, torch.float32, torch.float32]
    for one, other in zip((found, *ours), (plain, *theirs), strict=True):
        assert ((one.float() - other.float()).norm() / other.float().norm()).item() < 1e-2


def test_on_a_gpu_what_is_dropped_is_a_mask_and_dropped_again_in_the_backward():
    torch.manual_seed(0)
    x, eye = torch.randn(200, 50).abs().add(1).requires_grad_(), torch.eye(50)
    found = lora_linear(x, torch.zeros(50, 50), None, eye, eye, 2.0, 0.3, on_gpu=True)
    (gradient,) = torch.autograd.grad(found.sum(), [x])
    torch.testing.assert_close(found, x * gradient)
    assert (gradient == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert gradient.max().item() == pytest.approx(2.0 / 0.7)
