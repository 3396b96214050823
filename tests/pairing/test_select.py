import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from croco.errors import UserError
from croco.pairing.pools import build_pools
from croco.pairing.select import NO_ROW, parse_rule, select, share_other_than_minimum, targets
from pairing import twin

REJECTED = ["mean-2std", "mean-1std", "mean", "mean-0.5std", "min", "q1"]
SCHEMA = {"prompt_id": pl.String, "language": pl.String, "sample_id": pl.Int32, "score": pl.Float32}


def frame(rows: list[twin.Row]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def one_pool(scores: list[float]) -> pl.DataFrame:
    return frame([("p", "da", index, score) for index, score in enumerate(scores)])


def picked(scores: list[float], rejected: str) -> tuple[int, int]:
    pools = build_pools(one_pool(scores), "language")
    selection = select(pools, parse_rule("max"), parse_rule(rejected))
    return int(selection.chosen[0]), int(selection.rejected[0])


def test_the_rules_by_hand():
    scores = [0.0, 2.0, 4.0, 6.0, 8.0]  # mean 4, population std sqrt(8) = 2.83
    assert picked(scores, "mean") == (4, 2)
    assert picked(scores, "mean-1std") == (4, 1)  # target 1.17: 2 is nearer than 0
    assert picked(scores, "mean-2std") == (4, 0)  # target -1.66
    assert picked(scores, "min") == (4, 0)
    assert picked(scores, "q1") == (4, 1)  # the first quartile is 2
    assert picked(scores, "quantile:0.75") == (4, 3)


def test_equally_near_takes_the_lower_sample_id():
    assert picked([9.0, 1.0, 3.0, -5.0], "mean") == (0, 1)  # mean 2, both 1 away
    assert picked([9.0, 3.0, 1.0, -5.0], "mean") == (0, 1)
    assert picked([5.0, 5.0, 1.0, 1.0], "min") == (0, 2)


def test_the_chosen_is_never_its_own_rejected():
    assert picked([1.0, 9.0], "mean+3*std") == (1, 0)  # the target lies above everything


@pytest.mark.parametrize("scores", [[1.5], [0.1] * 7])
def test_nothing_strictly_below_gives_no_pair(scores):
    assert picked(scores, "mean-2std") == (0, NO_ROW)


def test_share_of_pools_in_which_the_rule_is_not_the_minimum():
    def share(num_completions: int) -> float:
        scores = np.random.default_rng(0).normal(size=(3000, num_completions)).astype(np.float32)
        index = np.arange(scores.size)
        rows = pl.DataFrame({
            "prompt_id": [f"p{i:05d}" for i in index // num_completions], "language": ["da"] * scores.size,
            "sample_id": index % num_completions, "score": scores.ravel(),
        })  # fmt: skip
        pools = build_pools(rows, "language")
        return share_other_than_minimum(pools, select(pools, parse_rule("max"), parse_rule("mean-2std")))

    # With ddof 0 the minimum is never below mean - std * sqrt(N - 1): METHOD's table for Gaussian scores.
    assert share(5) == 0.0
    assert share(16) == pytest.approx(0.04, abs=0.02)
    assert share(64) == pytest.approx(0.74, abs=0.03)


@pytest.mark.parametrize("text", ["best", "mean-std", "quantile:1.5", "mean-2stds", "q2", ""])
def test_unknown_rules_are_errors(text):
    with pytest.raises(UserError, match="expected"):
        parse_rule(text)


def test_quantiles_agree_with_numpy():
    scores = np.random.default_rng(1).normal(size=37).astype(np.float32)
    pools = build_pools(one_pool(scores.tolist()), "language")
    for q in (0.0, 0.1, 0.25, 0.5, 1.0):
        assert targets(parse_rule(f"quantile:{q}"), pools)[0] == pytest.approx(
            np.quantile(scores.astype(float), q)
        )


finite = st.floats(-50, 50, width=32)
few_values = st.integers(-3, 3).map(float)  # many ties


@st.composite
def tables(draw: st.DrawFn) -> list[twin.Row]:
    """A few prompts in a few languages (some missing), pools of 1 to 200, ties and constants; in any
    order.
    """
    rows = []
    for prompt in draw(
        st.lists(st.sampled_from(["a", "b", "ø", "p 10", "p 9"]), min_size=1, max_size=3, unique=True)
    ):
        for language in draw(
            st.lists(st.sampled_from(["da", "nl", "en"]), min_size=1, max_size=3, unique=True)
        ):
            size = draw(st.one_of(st.integers(1, 8), st.integers(9, 200)))
            values = draw(st.one_of(
                st.lists(draw(st.sampled_from([finite, few_values])), min_size=size, max_size=size),
                finite.map(lambda value, size=size: [value] * size),
            ))  # fmt: skip
            rows += [(prompt, language, index, value) for index, value in enumerate(values)]
    return rows


@settings(max_examples=80, deadline=None)
@given(tables(), st.sampled_from(REJECTED), st.sampled_from(["language", "all"]), st.randoms())
def test_the_fast_path_is_the_obvious_twin(rows, rule, pool, random):
    expected = twin.pairs(rows, pool, rule)
    shuffled = random.sample(rows, len(rows))
    pools = build_pools(frame(shuffled), pool)
    selection = select(pools, parse_rule("max"), parse_rule(rule))
    assert pools.num_pools == len(twin.pools_of(rows, pool))
    names = pools.rows.rows()
    found = {}
    for chosen, rejected in zip(selection.chosen, selection.rejected, strict=True):
        if rejected != NO_ROW:
            row = names[chosen]
            found[row[:1] if pool == "all" else row[:2]] = (row, names[rejected])
    assert found.keys() == expected.keys()
    for key, (chosen, rejected) in found.items():
        assert chosen == expected[key][0]
        assert rejected[3] < chosen[3]
        assert rejected in expected[key][1]
        if rule == "min" or len({row[3] for row in expected[key][1]}) == 1:
            assert rejected == expected[key][1][0]  # equal scores: the first in key order, nothing else


@settings(max_examples=40, deadline=None)
@given(tables(), st.sampled_from(REJECTED), st.sampled_from(["language", "all"]), st.randoms())
def test_shuffled_input_gives_identical_output(rows, rule, pool, random):
    outputs = []
    for order in (rows, random.sample(rows, len(rows))):
        pools = build_pools(frame(order), pool)
        selection = select(pools, parse_rule("max"), parse_rule(rule))
        outputs.append(
            (pools.rows, selection.chosen.tolist(), selection.rejected.tolist(), pools.mean, pools.std)
        )
    assert outputs[0][0].equals(outputs[1][0])
    assert outputs[0][1:3] == outputs[1][1:3]
    assert np.array_equal(outputs[0][3], outputs[1][3])
    assert np.array_equal(outputs[0][4], outputs[1][4])
