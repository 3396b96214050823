"""Selection by hand, and `croco.pairs` against the slow twin."""

from __future__ import annotations

from random import Random

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import croco
from croco.config.rules import parse_chosen, parse_rejected
from croco.errors import UserError
from croco.stages.pair.contrast import NO_CANDIDATE, NONE_BELOW, ONE_CANDIDATE
from croco.stages.pair.guards import SAME_TEXT
from croco.stages.pair.select import Pools, expected_share, select
from stages.pair import twin
from stages.pair.twin import Row

CHOSEN = ["max", "mean+1std", "mean+0.5*std", "quantile:0.9"]
REJECTED = ["mean-2std", "mean-1std", "mean", "mean-0.5*std", "min", "q1", "quantile:0.1", "gap:1.5"]
POOLS = ["language", "all", {"nordic": ["da", "sv"]}]


def frame(rows: list[Row]) -> pl.DataFrame:
    columns = {name: [getattr(row, name) for row in rows] for name in Row.__dataclass_fields__}
    types = {"sample_id": pl.Int32, "score": pl.Float32}
    return pl.DataFrame(columns, schema_overrides={**types, "prompt_id": pl.String, "language": pl.String})


def one_pool(scores: list[float]) -> pl.DataFrame:
    return frame([Row("p", "da", index, score) for index, score in enumerate(scores)]).drop("completion")


def picked(
    scores: list[float], rejected: str, chosen: str = "max", **options
) -> list[tuple[int, int | None]]:
    pairs, _ = croco.pairs(one_pool(scores), chosen, rejected, **options)
    return pairs.select("chosen_sample_id", "rejected_sample_id").rows()


def test_the_rules_by_hand():
    scores = [0.0, 2.0, 4.0, 6.0, 8.0]  # mean 4, population std sqrt(8) = 2.83
    assert picked(scores, "mean") == [(4, 2)]
    assert picked(scores, "mean-1std") == [(4, 1)]  # target 1.17: 2 is nearer than 0
    assert picked(scores, "mean-2std") == [(4, 0)]  # target -1.66
    assert picked(scores, "min") == [(4, 0)]
    assert picked(scores, "q1") == [(4, 1)]  # the first quartile is 2
    assert picked(scores, "quantile:0.75") == [(4, 3)]
    assert picked(scores, "gap:5") == [(4, 1)]  # target 3, between 2 and 4: the lower sample_id
    assert picked(scores, "gap:0") == [(4, 3)]  # the nearest that is strictly below
    assert picked(scores, "min", chosen="mean+1std") == [(3, 0)]  # target 6.83
    assert picked(scores, "min", chosen="quantile:0.5") == [(2, 0)]
    assert picked(scores, "none") == [(4, None)]


def test_equally_near_takes_the_lower_sample_id():
    assert picked([9.0, 1.0, 3.0, -5.0], "mean") == [(0, 1)]  # mean 2, both 1 away
    assert picked([9.0, 3.0, 1.0, -5.0], "mean") == [(0, 1)]
    assert picked([5.0, 5.0, 1.0, 1.0], "min") == [(0, 2)]
    # across languages too: the sample decides before the language does
    rows = [Row("p", "da", 1, 9.0), Row("p", "nl", 0, 9.0), Row("p", "da", 3, 1.0), Row("p", "nl", 2, 1.0)]
    pairs, _ = croco.pairs(frame(rows).drop("completion"), pool="all", rejected="min")
    assert pairs.select("chosen_language", "rejected_language").rows() == [("nl", "nl")]


def test_the_chosen_is_never_its_own_rejected():
    assert picked([1.0, 9.0], "mean+3*std") == [(1, 0)]  # the target lies above everything


def test_several_pairs_use_no_completion_twice():
    scores = [0.0, 2.0, 4.0, 6.0, 8.0]
    assert picked(scores, "min", pairs_per_pool=2) == [(4, 0), (3, 1)]
    assert picked(scores, "min", pairs_per_pool=9) == [(4, 0), (3, 1)]  # 4.0 is left alone
    assert picked(scores, "none", pairs_per_pool=3) == [(4, None), (3, None), (2, None)]
    pairs, _ = croco.pairs(one_pool(scores), rejected="min", pairs_per_pool=2)
    assert pairs["pair_id"].to_list() == [0, 1]
    assert pairs["pool_mean"].to_list() == [4.0, 4.0]  # the pool stays what it was


@pytest.mark.parametrize(
    ("scores", "reason"), [([1.5], ONE_CANDIDATE), ([0.1] * 7, NONE_BELOW), ([float("inf")], NO_CANDIDATE)]
)
def test_a_pool_without_a_pair_is_in_the_ledger(scores, reason):
    pairs, dropped = croco.pairs(one_pool(scores))
    assert pairs.height == 0
    assert dropped.filter(pl.col("unit") == "pool")["reason"].to_list() == [reason]


def test_a_score_that_is_no_number_enters_no_mean():
    pairs, dropped = croco.pairs(one_pool([0.0, float("nan"), 1.0, float("-inf")]))
    assert pairs.select("pool_size", "pool_mean", "pool_min").row(0) == (2, 0.5, 0.0)
    assert dropped.select("sample_id", "reason").rows() == [
        (1, "score is not finite"),
        (3, "score is not finite"),
    ]


# METHOD's table for Gaussian scores: with ddof 0 the minimum is never below mean - std * sqrt(N - 1)
@pytest.mark.parametrize(
    ("size", "share"), [(2, 0.0), (8, 0.0), (16, 0.04), (24, 0.19), (32, 0.32), (64, 0.74), (128, 0.96)]
)
def test_the_expected_share_of_small_pools(size, share):
    found = expected_share(parse_chosen("max"), parse_rejected("mean-2std"), size)
    assert found == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("text", ["best", "mean-std", "quantile:1.5", "mean-2stds", "q2", ""])
def test_unknown_rules_are_errors(text):
    for parse in (parse_chosen, parse_rejected):
        with pytest.raises(UserError, match="expected"):
            parse(text)


def test_a_side_has_rules_of_its_own():
    for parse, text in (
        (parse_chosen, "gap:1"),
        (parse_chosen, "none"),
        (parse_rejected, "reference"),
        (parse_rejected, "max"),
    ):
        with pytest.raises(UserError, match="expected"):
            parse(text)


def test_quantiles_agree_with_numpy():
    scores = np.random.default_rng(1).normal(size=37).astype(np.float32)
    scores[5] = -0.0
    pools = Pools(np.zeros(37, np.int64), scores, np.arange(37))
    for q in (0.0, 0.1, 0.25, 0.5, 1.0):
        assert parse_rejected(f"quantile:{q}").target(pools)[0] == pytest.approx(
            np.quantile(scores.astype(float), q)
        )


def test_pool_statistics_do_not_cancel():
    pools = Pools(np.array([0, 0, 0, 4]), np.array([1e4, 1e4 + 1, 1e4 + 2, 5], np.float32), np.arange(4))
    assert pools.mean.tolist() == [10_001.0, 5.0]
    assert pools.std.tolist() == [pytest.approx(np.sqrt(2 / 3), rel=1e-12), 0.0]  # population: ddof 0


def test_no_rows_make_no_pools():
    nothing = Pools(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int64))
    assert select(nothing, parse_chosen("max"), parse_rejected("min")).is_empty()
    pairs, dropped = croco.pairs(one_pool([]))
    assert (pairs.height, dropped.height) == (0, 0)


finite = st.floats(-50, 50, width=32)
few_values = st.integers(-3, 3).map(float)  # many ties
odd_values = st.sampled_from([float("nan"), float("inf"), 0.0, -0.0, 1.0])
FOX = "the quick brown fox jumps over the lazy dog"
COLD = "Åh ja, det er en kold dag i dag"
texts = st.sampled_from(
    ["", " \n", "Ja.", "ja.", "Ja .", "JA.  ", COLD, COLD.lower().replace("kold", "kold "), FOX, f"{FOX}!",
     FOX.replace("fox ", "fox\n").capitalize(), "天気がいいですね", "天気が いいですね"]
)  # fmt: skip


@st.composite
def tables(draw: st.DrawFn) -> list[Row]:
    """A few prompts in a few languages (some missing), pools of 1 to 200; ties, constants, NaN, repeated texts."""
    rows = []
    for prompt in draw(
        st.lists(st.sampled_from(["a", "b", "ø", "p 10", "p 9"]), min_size=1, max_size=3, unique=True)
    ):
        for language in draw(
            st.lists(st.sampled_from(["da", "nl", "sv"]), min_size=1, max_size=3, unique=True)
        ):
            size = draw(st.one_of(st.integers(1, 8), st.integers(9, 200)))
            kind = draw(st.sampled_from([finite, few_values, odd_values, st.just(draw(finite))]))
            values = draw(st.lists(kind, min_size=size, max_size=size))
            plain = draw(st.booleans())
            for index, value in enumerate(values):
                text = f"{prompt} {language} number {index}" if plain else draw(texts)
                rows.append(
                    Row(
                        prompt,
                        language,
                        index,
                        value,
                        text,
                        draw(st.sampled_from(["stop", "stop", "length"])),
                    )
                )
    return rows


@settings(max_examples=100, deadline=None)
@given(tables(), st.sampled_from(CHOSEN), st.sampled_from(REJECTED), st.sampled_from(POOLS), st.randoms())
@example([Row("a", "da", 0, 0.0, "Ja."), Row("a", "nl", 0, 1.0, "Ja.")], "max", "mean-2std", "all", Random(0))
def test_the_fast_path_is_the_obvious_twin(rows, chosen, rejected, pool, random):
    kept, left_out = twin.candidates(rows)
    pools = twin.pools_of(kept, pool)
    shuffled = random.sample(rows, len(rows))
    pairs, dropped = croco.pairs(frame(shuffled), chosen, rejected, pool, guards={"wrong_language": "off"})
    once = croco.pairs(frame(rows), chosen, rejected, pool, guards={"wrong_language": "off"})
    assert pairs.equals(once[0])
    assert dropped.equals(once[1])

    gone = dropped.filter(pl.col("unit") == "completion")
    assert {
        row[:3]: row[3] for row in gone.select("prompt_id", "language", "sample_id", "reason").rows()
    } == left_out
    by_key = {(row.prompt_id, row.language, row.sample_id): row for row in rows}
    found = {}
    for pair in pairs.iter_rows(named=True):
        one = by_key[pair["prompt_id"], pair["chosen_language"], pair["chosen_sample_id"]]
        other = by_key[pair["prompt_id"], pair["rejected_language"], pair["rejected_sample_id"]]
        assert (pair["chosen"], pair["rejected"]) == (one.completion, other.completion)
        [key] = [key for key, members in pools.items() if one in members]
        assert other in pools[key], "a pool mixes prompts or groups"
        assert pair["chosen_score"] > pair["rejected_score"]
        assert pair["pool_size"] == len(pools[key])
        found[key] = (one, other)
    for key, members in pools.items():
        first, last = twin.pair(members, chosen, rejected)
        if len(first) > 1 and len({row.score for row in first}) > 1:
            continue  # two scores equally far from the target, but for rounding: either may be chosen
        if key not in found and first[0].completion in {row.completion for row in last}:
            reasons = dropped.filter(pl.col("unit") == "pool", pl.col("prompt_id") == key[0])["reason"]
            assert SAME_TEXT in reasons.to_list()
            continue
        assert (key in found) == bool(last), key
        if key in found:
            assert found[key][0] == first[0]
            assert found[key][1] in last
            if len({row.score for row in last}) == 1:
                assert found[key][1] == last[0]  # equal scores: sample_id decides, and nothing else


def test_the_same_text_under_two_ids_stays_two_prompts():
    rows = [
        Row(prompt, "da", index, float(index), f"text {index}")
        for prompt in ("p1", "p2")
        for index in range(3)
    ]
    pairs, _ = croco.pairs(frame(rows))
    assert pairs["prompt_id"].to_list() == ["p1", "p2"]


def test_bad_scores_are_named():
    table = one_pool([1.0, 2.0])
    with pytest.raises(
        UserError, match="scores: prompt_id 'p', language 'da', sample_id 1 occurs more than once"
    ):
        croco.pairs(pl.concat([table, table[1:]]))
    with pytest.raises(UserError, match="row 2 has no score"):
        croco.pairs(table.with_columns(score=pl.Series([1.0, None])))
    with pytest.raises(UserError, match="no column 'language': found prompt_id"):
        croco.pairs(table.drop("language"))
    with pytest.raises(UserError, match="row 1 has no language"):
        croco.pairs(table.with_columns(language=pl.Series([None, "da"])))
    with pytest.raises(UserError, match="pool = 'nordic', expected one of 'language' or 'all'"):
        croco.pairs(table, pool="nordic")
    with pytest.raises(UserError, match="prompt = 'Chosen'"):
        croco.pairs(table, prompt="Chosen")
    with pytest.raises(UserError, match=r"guards\.empty = 'remove', expected one of 'drop', 'flag' or 'off'"):
        croco.pairs(table, guards={"empty": "remove"})
    with pytest.raises(UserError, match=r"unknown key 'guards.emty'; did you mean 'guards.empty'\?"):
        croco.pairs(table, guards={"emty": "drop"})
    with pytest.raises(UserError, match='prompt = "random" needs a rejected completion'):
        croco.pairs(table, rejected="none", prompt="random")
    with pytest.raises(UserError, match="languages names 'dk'"):
        croco.pairs(table, languages=["dk"])
    assert croco.pairs(table.with_columns(prompt_id=pl.lit(7)))[0]["prompt_id"].to_list() == ["7"]
    with pytest.raises(UserError, match="'da' is in the groups a and b"):
        croco.pairs(table, pool={"a": ["da"], "b": ["nl", "da"]})
    with pytest.raises(UserError, match="group nl has the name of a language in no group"):
        croco.pairs(pl.concat([table, table.with_columns(language=pl.lit("nl"))]), pool={"nl": ["da"]})
    with pytest.raises(UserError, match="group a is empty"):
        croco.pairs(table, pool={"a": []})


def test_tables_of_every_library_are_read():
    import datasets
    import pandas

    table = frame([Row("p", "da", index, float(index), f"text {index}") for index in range(3)])
    wanted = croco.pairs(table)
    rows = table.to_dict(as_series=False)
    lists = [table.lazy(), table.to_arrow(), pandas.DataFrame(rows), datasets.Dataset.from_dict(rows), rows]
    lists.append(
        table.with_columns(pl.col("language", "completion").cast(pl.Categorical), pl.col("score").cast(int))
    )
    for other in [*lists, *(one.drop("sample_id") for one in (table, table.lazy()))]:
        made = croco.pairs(other)
        assert made[0].equals(wanted[0]), type(other)
        assert made[1].equals(wanted[1])


def test_without_sample_ids_completions_are_numbered_in_their_order():
    rows = [
        Row(prompt, code, 0, score) for score in (1.0, 3.0, 2.0) for prompt in "pq" for code in ("da", "nl")
    ]
    pairs, _ = croco.pairs(frame(rows).drop("completion", "sample_id"), rejected="min")
    assert pairs.height == 4
    assert pairs.select("chosen_sample_id", "rejected_sample_id").unique().rows() == [(1, 0)]


@pytest.mark.parametrize(("column", "values", "message"), [
    ("score", ["1", "x"], "column 'score' holds String, expected numbers"),
    ("score", [True, False], "column 'score' holds Boolean, expected numbers"),
    ("sample_id", [0, 2**40], "column 'sample_id' holds Int64, expected Int32"),
    ("completion", [1, 2], "column 'completion' holds Int64, expected text"),
    ("completion", ["a", None], "row 2 has no completion, expected text"),
    ("prompt_id", [[1], [2]], r"column 'prompt_id' holds List\(Int64\), expected text"),
    ("sample_id", [0.0, 1.5], "column 'sample_id' holds 1.5, expected whole numbers"),
])  # fmt: skip
def test_columns_of_another_type_are_named(column, values, message):
    with pytest.raises(UserError, match=message):
        croco.pairs(one_pool([1.0, 2.0]).with_columns(pl.Series(column, values)))
    for scores in (7, "scores.jsonl", None):
        with pytest.raises(UserError, match=r"expected a table|no column"):
            croco.pairs(scores)


def test_a_gold_completion_in_the_table_can_be_chosen():
    """A row with sample_id -1 is a gold completion: chosen under "reference", and never a member of its pool."""
    rows = [Row("p", "da", number - 1, value, text) for number, (value, text) in
            enumerate([(2.5, "gold"), (0.0, "a"), (3.0, "b"), (1.0, "gold")])]  # fmt: skip
    pairs, dropped = croco.pairs(frame(rows), chosen="reference", rejected="min")
    columns = ["chosen", "rejected", "chosen_sample_id", "chosen_score", "pool_size"]
    assert pairs.select(columns).rows() == [("gold", "a", -1, 2.5, 3)]
    assert dropped.is_empty()
    plain, _ = croco.pairs(frame(rows), rejected="min")
    assert plain.select(columns).rows() == [("b", "a", 1, 3.0, 3)]
