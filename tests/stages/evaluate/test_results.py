import polars as pl
import pytest

from croco.errors import UserError
from croco.report.scores import boards
from croco.report.sentences import sentence
from croco.report.table import POINTS, Number
from croco.stages.evaluate.results import on_common_prompts, summarise

GROUPS = {"tuned": ["da", "nl"], "held-out": ["sv"], "low-resource": [], "all": ["da", "nl", "sv"]}


def verdicts(*rows: tuple[str, str, str, float, int, str], benchmark: str = "lab") -> pl.DataFrame:
    """(arm, prompt_id, language, temperature, sample_id, mode); value 1 when the mode is good."""
    return pl.DataFrame(
        [
            {"arm": a, "prompt_id": p, "language": c, "temperature": t, "sample_id": s, "mode": m,
             "benchmark": benchmark, "value": float(m == "good")}
            for a, p, c, t, s, m in rows
        ]
    )  # fmt: skip


def two_arms() -> pl.DataFrame:
    return verdicts(
        ("base", "p1", "da", 0.0, 0, "terse"),
        ("base", "p1", "nl", 0.0, 0, "good"),
        ("base", "p2", "da", 0.0, 0, "terse"),
        ("base", "p2", "nl", 0.0, 0, "evasive"),
        ("base", "p1", "da", 0.7, 0, "good"),
        ("base", "p1", "nl", 0.7, 0, "good"),
        ("base", "p2", "da", 0.7, 0, "terse"),
        ("base", "p2", "nl", 0.7, 0, "terse"),
        ("croco", "p1", "da", 0.0, 0, "good"),
        ("croco", "p1", "nl", 0.0, 0, "good"),
        ("croco", "p2", "da", 0.0, 0, "good"),
        ("croco", "p2", "nl", 0.0, 0, "terse"),
    )


def value(results: pl.DataFrame, arm: str, language: str, metric: str, temperature: float = 0.0) -> float:
    row = results.filter(
        (pl.col("arm") == arm) & (pl.col("language") == language) & (pl.col("metric") == metric)
        & (pl.col("temperature") == temperature)
    )  # fmt: skip
    assert row.height == 1
    return row["value"][0]


def test_shares_and_differences_by_hand():
    results = summarise(two_arms(), GROUPS, seed=1, num_resamples=200)
    assert value(results, "base", "da", "good") == 0.0
    assert value(results, "croco", "da", "good") == 1.0
    assert value(results, "croco", "tuned", "good") == 0.75
    assert value(results, "croco", "tuned", "mode:terse") == 0.25
    assert (
        value(results, "croco", "tuned", "mode:evasive") == 0.0
    )  # a mode another arm shows is a zero, not a gap
    assert value(results, "croco", "tuned", "difference") == 0.5
    assert value(results, "base", "tuned", "best-temperature", 0.7) == 0.7
    assert value(results, "croco", "tuned", "difference-to-best-base") == 0.25
    assert value(results, "base", "nl", "best-temperature", 0.0) == 0.0  # equal at 0.7: the lowest
    assert set(results["language"]) == {"da", "nl", "tuned", "all"}  # no language of the others was evaluated
    assert results["n"].unique().to_list() == [2]  # prompts, not completions


def test_a_group_resamples_prompts_jointly():
    # Six prompts, half of them good in both languages and half bad in both: the group is as uncertain as one language.
    rows = [
        ("base", f"p{i}", c, 0.0, 0, "good" if i % 2 else "terse") for i in range(6) for c in ("da", "nl")
    ]
    results = summarise(verdicts(*rows), GROUPS, seed=1, num_resamples=500)
    intervals = results.filter(pl.col("metric") == "good").select("ci_low", "ci_high").unique()
    assert intervals.rows() == [(intervals["ci_low"][0], intervals["ci_high"][0])]
    assert intervals["ci_high"][0] - intervals["ci_low"][0] > 0.6  # twelve prompts would give about 0.5


def test_one_test_prompt_has_no_interval_and_no_verdict():
    rows = [("base", "p1", "da", 0.0, 0, "terse"), ("croco", "p1", "da", 0.0, 0, "good")]
    results = summarise(verdicts(*rows), GROUPS, seed=1, num_resamples=100)
    (row,) = results.filter((pl.col("metric") == "difference") & (pl.col("language") == "da")).to_dicts()
    assert (row["value"], row["ci_low"], row["ci_high"], row["n"]) == (1.0, None, None, 1)
    (board,) = boards(results, ["croco"], ["da"])
    assert sentence(board, "croco") == "Not resolved on tuned (+100 greedy)."
    cell = board.cell("croco", 0.0, "da")
    number = Number(cell.difference, POINTS)
    assert number.with_interval == "+100 [too few prompts]"
    assert "nan" not in number.with_half_width


def test_samples_are_averaged_inside_a_prompt():
    rows = [("base", "p1", "da", 1.0, s, "good" if s else "terse") for s in range(4)]
    rows += [("base", "p2", "da", 1.0, s, "terse") for s in range(4)]
    results = summarise(verdicts(*rows), GROUPS, seed=1, num_resamples=100)
    assert value(results, "base", "da", "good", 1.0) == 0.375


def test_results_do_not_depend_on_row_order():
    table = two_arms()
    shuffled = summarise(table.sample(fraction=1, shuffle=True, seed=7), GROUPS, seed=1, num_resamples=100)
    assert shuffled.equals(summarise(table, GROUPS, seed=1, num_resamples=100))


def test_arms_with_other_prompts_are_an_error():
    table = two_arms().filter(~((pl.col("arm") == "croco") & (pl.col("prompt_id") == "p2")))
    with pytest.raises(
        UserError, match=r'Arm "croco" at temperature 0.0 has verdicts for 2 prompts .* expected the 4'
    ):
        summarise(table, GROUPS, seed=1, num_resamples=100)


def test_prompts_that_one_arm_lacks_are_left_out_of_all():
    table = two_arms().filter(
        ~((pl.col("arm") == "croco") & (pl.col("prompt_id") == "p2") & (pl.col("language") == "nl"))
    )
    common = on_common_prompts(table)
    assert (two_arms().height - common.height, common.height) == (3, 9)
    assert common.filter((pl.col("prompt_id") == "p2") & (pl.col("language") == "nl")).is_empty()
    results = summarise(common, GROUPS, seed=1, num_resamples=100)
    assert value(results, "base", "nl", "good") == 1.0
    assert on_common_prompts(two_arms()).height == two_arms().height


def test_arms_without_a_common_prompt_are_an_error():
    table = two_arms().with_columns(
        prompt_id=pl.when(pl.col("arm") == "croco").then(pl.lit("other")).otherwise(pl.col("prompt_id"))
    )
    with pytest.raises(UserError, match='"croco" at temperature 0 has verdicts on 2'):
        on_common_prompts(table)


def test_real_prompts_report_the_score():
    table = two_arms().with_columns(pl.lit("reward").alias("benchmark"), pl.col("value") * 3.0 - 1.0)
    results = summarise(table, GROUPS, seed=1, num_resamples=100)
    assert value(results, "croco", "da", "score") == 2.0
    assert value(results, "croco", "tuned", "difference") == 1.5


def test_p_values_by_hand():
    # five prompts in two languages, all of them wrong before and right after in da, one in nl
    rows = []
    for number in range(5):
        for language in ("da", "nl"):
            after = "good" if language == "da" or number == 0 else "terse"
            rows += [
                ("base", f"p{number}", language, 0.0, 0, "terse"),
                ("croco", f"p{number}", language, 0.0, 0, after),
            ]
    results = summarise(verdicts(*rows), GROUPS, seed=1, num_resamples=50)
    assert value(results, "croco", "da", "difference-p") == 2 / 2**5  # McNemar's, five of five
    assert value(results, "croco", "nl", "difference-p") == 1.0  # one of one
    assert value(results, "croco", "da", "difference-p-holm") == 2 * 2 / 2**5
    assert value(results, "croco", "nl", "difference-p-holm") == 1.0
    # differences 1, 1, 1, 1, 2 of the pool: all signs alike in 2 of 2⁵ patterns; tuned and all are two groups
    assert value(results, "croco", "tuned", "difference-p") == 2 / 2**5
    assert value(results, "croco", "tuned", "difference-p-holm") == 2 * 2 / 2**5
    # 1, 0, 0, 0, 0: mean 0.2, std √0.2, (2.8016 · √0.2 / 0.2)² = 39.2
    assert value(results, "croco", "nl", "prompts-to-resolve") == 40.0
    assert results.filter((pl.col("arm") == "base") & pl.col("metric").str.contains("-p")).is_empty()


def test_language_fidelity_is_of_those_that_can_be_told():
    table = two_arms().with_columns(
        found_language=pl.when(pl.col("mode") == "good")
        .then(pl.col("language"))
        .when(pl.col("mode") == "terse")
        .then(pl.lit("da"))
    )
    results = summarise(table, GROUPS, seed=1, num_resamples=50)
    # nl: good is nl, evasive tells nothing, terse is da
    assert value(results, "base", "nl", "right-language") == 1.0
    assert value(results, "base", "nl", "language-told") == 0.5
    assert value(results, "croco", "nl", "right-language") == 0.5
    assert value(results, "croco", "nl", "language-told") == 1.0
    assert value(results, "base", "tuned", "right-language") == 1.0
    assert value(results, "croco", "tuned", "right-language") == 0.75
    (n,) = results.filter(
        (pl.col("arm") == "base") & (pl.col("language") == "nl") & (pl.col("metric") == "right-language")
        & (pl.col("temperature") == 0)
    )["n"].to_list()  # fmt: skip
    assert n == 1
    nothing = table.with_columns(found_language=pl.lit(None, pl.String))
    results = summarise(nothing, GROUPS, seed=1, num_resamples=50)
    assert "right-language" not in results["metric"]
    assert value(results, "base", "nl", "language-told") == 0.0
