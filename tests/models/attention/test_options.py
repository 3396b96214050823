"""An option that changes what attention computes is never dropped by ours."""

import pytest
import torch

from croco.models.attention import decode, prefill, rows


@pytest.mark.parametrize(
    ("attend", "own"),
    [(decode.attend, "shared_prefix"), (prefill.attend, "batch"), (rows.attend, "segments")],
)
@pytest.mark.parametrize("option", ["s_aux", "softcap", "position_bias"])
def test_an_unknown_option_is_refused_by_name(attend, own, option):
    x = torch.zeros(1, 1, 1, 2)
    with pytest.raises(TypeError, match=f"does not know the option {option}"):
        attend(torch.nn.Module(), x, x, x, None, **{own: None, option: torch.ones(1)})
