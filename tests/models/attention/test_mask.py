"""The prefix mask against its definition, cell by cell."""

import pytest
import torch

from croco.models.attention.mask import additive, prefix_mask

# Prompt of 3, completions of 2 and 3, one column of padding.
BRANCH = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, -1]])
POSITION = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5, 0]])


def slow_mask(branch, position, window):
    num_tokens = len(branch)
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for q in range(num_tokens):
        for k in range(q + 1):
            same_sequence = branch[k] == branch[q] or branch[k] == 0
            seen = window is None or position[q] - position[k] < window
            mask[q, k] = same_sequence and seen and branch[k] != -1 and branch[q] != -1
        mask[q, q] = True
    return mask


def test_full_mask_is_what_the_definition_says():
    mask = prefix_mask(BRANCH, POSITION)[0, 0]
    assert mask[:-1].equal(slow_mask(BRANCH[0].tolist(), POSITION[0].tolist(), None)[:-1])
    assert mask[5].nonzero().flatten().tolist() == [0, 1, 2, 5]  # the second completion's first token


def test_window_counts_positions_not_columns():
    mask = prefix_mask(BRANCH, POSITION, window=3)[0, 0]
    assert mask[:-1].equal(slow_mask(BRANCH[0].tolist(), POSITION[0].tolist(), 3)[:-1])
    assert mask[5].nonzero().flatten().tolist() == [1, 2, 5]


def test_no_row_is_empty_and_nothing_real_sees_padding():
    mask = prefix_mask(BRANCH, POSITION, window=2)[0, 0]
    assert mask.any(1).all()
    assert not mask[:-1, -1].any()


def test_additive_forbids_what_the_mask_forbids():
    mask = prefix_mask(BRANCH, POSITION)
    scores = torch.zeros(mask.shape) + additive(mask, torch.float32)
    assert (scores.softmax(-1) > 0).equal(mask)


# Two pairs packed into one row, the second with completions of 1 and 2, and padding.
PACKED_BRANCH = torch.tensor([[0, 0, 1, 1, 2, 0, 0, 0, 1, 2, 2, -1, -1]])
PACKED_POSITION = torch.tensor([[0, 1, 2, 3, 2, 0, 1, 2, 3, 3, 4, 0, 0]])
PAIR = torch.tensor([[0] * 5 + [1] * 6 + [-1] * 2])


@pytest.mark.parametrize("window", [None, 2, 3])
def test_packed_pairs_do_not_see_each_other(window):
    mask = prefix_mask(PACKED_BRANCH, PACKED_POSITION, window, PAIR)[0, 0]
    for start, stop in ((0, 5), (5, 11)):
        alone = prefix_mask(PACKED_BRANCH[:, start:stop], PACKED_POSITION[:, start:stop], window)[0, 0]
        assert mask[start:stop, start:stop].equal(alone)
        assert mask[start:stop].sum() == alone.sum()
