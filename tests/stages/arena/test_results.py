"""Win rates by hand, from comparisons to rows."""

from typing import Any

import numpy as np
import polars as pl
import pytest

from croco.errors import UserError
from croco.stages.arena.judge_prompt import value_of
from croco.stages.arena.results import arena_rows, compared_in_all_arms
from croco.stages.evaluate import stats
from croco.stages.evaluate.winrate import fit
from croco.storage.schemas import COMPARISONS

GROUPS = {"tuned": ["da", "en"], "low-resource": [], "all": ["da", "en"]}


def comparison(
    prompt: str, language: str, first: str, second: str, arm: str = "croco", asked: bool = True, **more: Any
) -> dict[str, Any]:
    row = dict.fromkeys(COMPARISONS.schema.names)
    return row | {
        "arm": arm, "prompt_id": prompt, "language": language, "domain": "sum", "completion": "xx",
        "base_completion": "xx", "verdict_arm_first": first, "verdict_base_first": second,
        "value": value_of([first, second]), "judgement_arm_first": "…" if asked else None,
        "judgement_base_first": "…" if asked else None, "judge": "j", "judge_prompt_tokens": 0,
        "judge_completion_tokens": 0,
    } | more  # fmt: skip


def table(*rows: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(
        list(rows), schema=dict(pl.DataFrame(pl.from_arrow(COMPARISONS.schema.empty_table())).schema)
    )


def found(rows: pl.DataFrame, metric: str, scope: str = "da", arm: str = "croco") -> float:
    part = rows.filter((pl.col("metric") == metric) & (pl.col("language") == scope) & (pl.col("arm") == arm))
    (value,) = part["value"].to_list()
    return value


FOUR = (
    comparison("p1", "da", "arm", "arm"),
    comparison("p2", "da", "arm", "base", domain="list"),  # the first shown, twice
    comparison("p3", "da", "base", "base", domain="list"),
    comparison("p4", "da", "tie", "tie", asked=False),
)


def test_comparisons_judged_in_one_order():
    """Two with the arm's first, two with the base's: what the first place is worth shows, agreement cannot."""
    one = [
        comparison(
            p, "da", first, second, value=value,
            judgement_arm_first=first and "…", judgement_base_first=second and "…",
        )
        for p, first, second, value in (
            ("p1", "arm", None, 1.0), ("p2", "base", None, 0.0), ("p3", None, "base", 0.0), ("p4", None, "tie", 0.5),
        )
    ]  # fmt: skip
    rows = arena_rows(table(*one), GROUPS, seed=1, num_resamples=200, temperature=0.1)
    assert found(rows, "win-rate") == 0.375
    assert found(rows, "position-bias") == pytest.approx((1 - 1 + 1 + 0) / 4)
    assert found(rows, "same-text") == 0.0
    assert "self-consistency" not in rows["metric"]
    assert rows["temperature"].unique().to_list() == [0.1]


def test_a_win_a_loss_an_inconsistent_one_and_the_same_text():
    rows = arena_rows(table(*FOUR), GROUPS, seed=1, num_resamples=200)
    assert found(rows, "win-rate") == 0.5
    assert found(rows, "tie") == 0.5
    assert found(rows, "same-text") == 0.25
    assert found(rows, "self-consistency") == pytest.approx(2 / 3)
    # six judgements, four for the first: p1 one each, p2 both, p3 one each
    assert found(rows, "position-bias") == pytest.approx((4 - 2) / 6)
    assert found(rows, "win-rate:list") == 0.25
    assert found(rows, "win-rate:sum") == 0.75
    assert found(rows, "lc-win-rate") == 0.5
    assert found(rows, "win-rate-p") == 1.0
    assert set(rows["temperature"]) == {0.0}
    assert set(rows["benchmark"]) == {"arena"}
    # no number of prompts tells a win rate of exactly one half from one half
    assert rows.filter(pl.col("metric") == "prompts-to-resolve").is_empty()


def test_a_judge_that_always_takes_the_second():
    rows = arena_rows(
        table(*(comparison(f"p{i}", "da", "base", "arm") for i in range(5))), GROUPS, seed=1, num_resamples=50
    )
    assert (found(rows, "position-bias"), found(rows, "self-consistency"), found(rows, "win-rate")) == (
        -1,
        0,
        0.5,
    )


def test_wins_that_are_length_are_taken_out():
    rows = [
        comparison(f"p{i}", "da", side, side, completion="x" * (100 + delta), base_completion="x" * 100)
        for i, (side, delta) in enumerate([("arm", 50), ("arm", 40), ("arm", 60), ("base", -30), ("arm", 45)])
    ]
    result = arena_rows(table(*rows), GROUPS, seed=1, num_resamples=100)
    expected = fit([1, 1, 1, 0, 1], [50, 40, 60, -30, 45], np.ones((1, 5))).value
    assert found(result, "win-rate") == 0.8
    assert found(result, "lc-win-rate") == pytest.approx(expected)
    assert expected < 0.77
    assert found(result, "length-difference") == pytest.approx((50 + 40 + 60 - 30 + 45) / 5)


def test_a_group_is_all_its_comparisons_and_resamples_prompts_jointly():
    english = [comparison(f"p{i}", "en", "arm", "arm") for i in range(1, 5)]
    few = arena_rows(table(*FOUR, *english), GROUPS, 1, 500)
    assert few.filter(pl.col("metric").is_in(["win-rate", "lc-win-rate"]))["ci_low"].null_count() == 8
    again = [row | {"prompt_id": f"q{row['prompt_id']}"} for row in (*FOUR, *english)]
    rows = arena_rows(table(*FOUR, *english, *again), GROUPS, seed=1, num_resamples=500)
    assert found(rows, "win-rate", "tuned") == 0.75
    assert found(rows, "lc-win-rate", "tuned") == pytest.approx(0.75)
    (n,) = rows.filter((pl.col("metric") == "win-rate") & (pl.col("language") == "tuned"))["n"].to_list()
    assert n == 8
    # per prompt (1 + 1)/2, (½ + 1)/2, (0 + 1)/2, (½ + 1)/2
    expected = stats.bootstrap_mean([1, 0.75, 0.5, 0.75] * 2, seed=1, num_resamples=500)
    (row,) = rows.filter((pl.col("metric") == "win-rate") & (pl.col("language") == "tuned")).to_dicts()
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((expected.low, expected.high))


def test_p_values_are_adjusted_over_languages_and_arms():
    rows = [
        comparison(f"p{i}", language, "arm", "arm", arm=arm)
        for arm, languages in (("croco", ("da", "en")), ("other", ("da", "en")))
        for language in languages
        for i in range(6)
    ]
    result = arena_rows(table(*rows), GROUPS, seed=0, num_resamples=20)
    # six of six: 2 of 64 patterns of signs; four languages and arms together, two groups × two arms among themselves
    assert found(result, "win-rate-p") == 2 / 64
    assert found(result, "win-rate-p-holm") == pytest.approx(4 * 2 / 64)
    assert found(result, "win-rate-p-holm", "tuned") == pytest.approx(4 * 2 / 64)


def test_right_language_of_both_sides():
    rows = [
        comparison("p1", "da", "arm", "arm", found_language="da", base_found_language="en"),
        comparison("p2", "da", "arm", "arm", found_language="da", base_found_language="da"),
        comparison("p3", "da", "arm", "arm", found_language=None, base_found_language=None),
        comparison("p4", "da", "arm", "arm", found_language="en", base_found_language="en"),
    ]
    result = arena_rows(table(*rows), GROUPS, seed=0, num_resamples=20)
    assert found(result, "right-language") == pytest.approx(2 / 3)
    assert found(result, "right-language", arm="base") == pytest.approx(1 / 3)


def test_only_what_all_arms_have_is_compared():
    rows = [*FOUR, *(dict(row, arm="other") for row in FOUR[:3])]
    kept, left_out = compared_in_all_arms(table(*rows), ["croco", "other"])
    assert (kept.height, left_out) == (6, 1)
    others = comparison("p9", "da", "arm", "arm", arm="other")
    with pytest.raises(UserError, match="arm 'other' has 1 comparisons, the fewest"):
        compared_in_all_arms(table(*FOUR, others), ["croco", "other"])
    with pytest.raises(UserError, match="arm 'third' has no comparisons, expected some of every arm"):
        compared_in_all_arms(table(*rows), ["croco", "other", "third"])
