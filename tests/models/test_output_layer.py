"""The output layer a few rows at a time against the whole of it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from croco.models import output_layer
from croco.models.output_layer import head_logps, token_logps

M, V, D = 37, 50, 8


class Largest(TorchDispatchMode):
    """The most numbers that a result of floating point had."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if torch.is_tensor(one) and one.is_floating_point():
                self.most = max(self.most, one.numel())
        return made


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(output_layer, "_LOGITS", {"cpu": 1})  # so parts of 32 rows: a whole one and the rest


def head(trained, bias=True):
    torch.manual_seed(0)
    hidden = torch.randn(M, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=trained)
    offset = torch.randn(V, requires_grad=trained) if bias else None
    return hidden, weight, offset, torch.randint(V, (M,))


def whole(hidden, weight, bias, target, scale, cap):
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    return token_logps(logits if cap is None else (logits / cap).tanh() * cap, target)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 5.0), (2.0, 3.0)])
def test_values_and_gradients_equal_the_whole_head(trained, scale, cap):
    hidden, weight, bias, target = head(trained)
    leaves = [hidden, weight, bias] if trained else [hidden]
    found = head_logps(hidden, weight, bias, target, scale=scale, cap=cap)
    expected = whole(hidden, weight, bias, target, scale, cap)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    outer = torch.linspace(-1, 2, M)
    for ours, theirs in zip(
        torch.autograd.grad((found * outer).sum(), leaves),
        torch.autograd.grad((expected * outer).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_bias_and_without_gradient():
    hidden, weight, bias, target = head(False, bias=False)
    with torch.no_grad():
        found = head_logps(hidden, weight, bias, target)
        torch.testing.assert_close(
            found, whole(hidden, weight, bias, target, 1.0, None), rtol=1e-5, atol=1e-6
        )
    assert not found.requires_grad


def test_a_frozen_head_keeps_nothing_as_wide_as_the_vocabulary():
    hidden, weight, bias, target = head(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        head_logps(hidden, weight, bias, target)
    assert kept == [(M, D)]
