"""Dropout from 16 bits: its share, its scale, its gradient, and that places are independent."""

import pytest
import torch

from croco.ops.dropout import Dropout, dropout


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_share_and_scale(share):
    torch.manual_seed(0)
    out = dropout(torch.ones(1000, 1001), share)  # not a multiple of four
    kept = out != 0
    deviation = (share * (1 - share) / out.numel()) ** 0.5
    assert (1 - kept.double().mean()).item() == pytest.approx(share, abs=5 * deviation + 1 / 65_536)
    values = out[kept].unique()
    assert values.numel() == 1
    assert values.item() == pytest.approx(1 / (1 - share), rel=1e-3)


def test_every_one_of_the_four_places_of_a_draw_has_the_share():
    torch.manual_seed(0)
    dropped = (dropout(torch.ones(400_000), 0.3) == 0).view(-1, 4).double()
    assert dropped.mean(0).tolist() == pytest.approx([0.3] * 4, abs=0.01)
    assert torch.corrcoef(dropped.T).fill_diagonal_(0).abs().max().item() < 0.02


def test_the_gradient_goes_where_the_values_went():
    torch.manual_seed(0)
    values = torch.randn(50, 3, requires_grad=True)
    out = dropout(values, 0.5)
    (gradient,) = torch.autograd.grad(out.sum(), values)
    torch.testing.assert_close(gradient * values, out)


def test_the_seed_decides_and_evaluation_keeps_all():
    layer, values = Dropout(0.5), torch.ones(100)
    torch.manual_seed(3)
    first = layer(values)
    torch.manual_seed(3)
    assert layer(values).equal(first)
    assert not layer(values).equal(first)
    assert layer.eval()(values).equal(values)
    assert layer.train()(values.bfloat16()).dtype == torch.bfloat16
