"""Which pairs make a step, and how a step is cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from croco.stages.train.batches import MICRO_BATCH_OVERHEAD, collate, cut, plan_steps
from croco.stages.train.encode import Example


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 3), st.integers(0, 2**63))
def test_every_epoch_holds_every_pair_once_in_steps_of_equal_size(num_pairs, batch_pairs, epochs, seed):
    steps = plan_steps(num_pairs, batch_pairs, epochs, seed)
    per_epoch = len(steps) // epochs
    for epoch in range(epochs):
        part = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(i for step in part for i in step) == list(range(num_pairs))
    sizes = [len(step) for step in steps]
    assert max(sizes) <= batch_pairs
    assert max(sizes) - min(sizes) <= 1


def test_the_plan_depends_on_the_seed_and_differs_between_epochs():
    assert plan_steps(50, 8, 2, 3) == plan_steps(50, 8, 2, 3)
    assert plan_steps(50, 8, 2, 3) != plan_steps(50, 8, 2, 4)
    steps = plan_steps(50, 50, 2, 3)
    assert steps[0] != steps[1]


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 2000))
def test_a_cut_holds_every_row_once_and_keeps_the_budget(lengths, budget):
    cuts = cut(range(len(lengths)), lengths, budget)
    assert sorted(i for rows in cuts for i in rows) == list(range(len(lengths)))
    for rows in cuts:
        assert len(rows) == 1 or len(rows) * max(lengths[i] for i in rows) <= budget


def test_the_cut_is_the_cheapest_one():
    lengths = [400, 10, 390, 12, 11, 200]
    cuts = cut(range(6), lengths, 2000)
    cost = sum(len(rows) * max(lengths[i] for i in rows) + MICRO_BATCH_OVERHEAD for rows in cuts)
    order = sorted(lengths, reverse=True)
    costs = []
    for joins in range(2**5):
        groups = [[order[0]]]
        for place, length in enumerate(order[1:]):
            if joins >> place & 1:
                groups[-1].append(length)
            else:
                groups.append([length])
        if all(len(group) * group[0] <= 2000 for group in groups):
            costs.append(sum(len(group) * group[0] + MICRO_BATCH_OVERHEAD for group in groups))
    assert cost == min(costs)


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 2000))
def test_packed_rows_are_filled_up(lengths, budget):
    cuts = cut(range(len(lengths)), lengths, budget, packed=True)
    assert sorted(i for rows in cuts for i in rows) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in rows) for rows in cuts]
    assert all(len(rows) == 1 or size <= budget for rows, size in zip(cuts, sizes, strict=True))
    for before, rows in zip(sizes, cuts[1:], strict=False):
        assert before + lengths[rows[0]] > budget


@pytest.mark.parametrize("layout", ["shared", "plain", "packed"])
def test_every_completion_token_is_predicted_from_the_token_before_it(layout):
    examples = [
        Example("a", "en", [1, 5, 6], ([7, 8, 2], [9, 2])),
        Example("b", "en", [1, 5, 6, 7, 8], ([2], [10, 11, 12, 2])),
    ]
    batch = collate(examples, rows="segments" if layout == "shared" else layout)
    ids, positions = batch.input_ids_BT.flatten(), batch.position_BT.flatten()
    found = {}
    for source, target, sequence in zip(batch.source_M, batch.target_M, batch.sequence_M, strict=True):
        found.setdefault(sequence.item(), []).append(
            (ids[source].item(), positions[source].item(), target.item())
        )
    assert found == {
        0: [(6, 2, 7), (7, 3, 8), (8, 4, 2)],
        1: [(8, 4, 2)],
        2: [(6, 2, 9), (9, 3, 2)],
        3: [(8, 4, 10), (10, 5, 11), (11, 6, 12), (12, 7, 2)],
    }
    assert batch.input_ids_BT.shape == {"shared": (2, 8), "plain": (4, 8), "packed": (1, 14)}[layout]
    assert batch.lengths[0] == ((3, 2, 1) if layout != "plain" else (3, 2))
    pairs, at = batch.pair_BT.flatten(), batch.sequence_M % 2
    assert pairs[batch.source_M].equal(at)
    assert np.prod(batch.input_ids_BT.shape) >= sum(example.num_tokens for example in examples)


def test_long_rows_go_by_segments_and_short_ones_by_a_mask():
    def pair(prompt, completion):
        return Example("a", "en", [1] * prompt, ([5] * completion, [6] * completion))

    assert collate([pair(100, 100)], rows="segments").rows == "segments"
    assert collate([pair(10, 10), pair(11, 10)], rows="segments").rows == "masked"
    assert collate([pair(10, 10)] * 10, rows="segments").rows == "segments"  # one call for all of them


def test_as_many_updates_as_asked_for_whatever_the_number_of_pairs():
    few, many = plan_steps(10, 4, 1, seed=0, updates=7), plan_steps(100, 4, 9, seed=0, updates=7)
    assert (len(few), len(many)) == (7, 7)
    assert few == plan_steps(10, 4, 3, seed=0)[:7]
    assert sorted(pair for step in few[:3] for pair in step) == list(range(10))  # an epoch is an epoch
