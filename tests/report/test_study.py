"""Claims, pooling and transfer by hand; and a whole study of the lab, killed, gone on with, and run again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from scipy.stats import kendalltau
from typer.testing import CliRunner

from croco.cli.main import app
from croco.config.load import load
from croco.config.study import Comparison, Study
from croco.errors import UserError
from croco.lab import world as lab
from croco.pipeline.seeds import parts
from croco.report import study
from croco.report.claims import EQUIVALENT, FAILS, HOLDS, OPEN, UNTESTABLE, claim_part, judge_all
from croco.report.contrasts import Runs, curve_at, frontier, p_wanted, run_tests
from croco.report.multi_seed import Pooled, pool
from croco.report.study import _best_places, together
from croco.report.transfer import FORMS, accuracy, best_and_tau, heuristic, read_scores
from croco.stages.evaluate.stats import Estimate, Interval
from croco.storage import files, shards
from croco.storage.schemas import COMPLETIONS, SCORES, VERDICTS


@pytest.mark.parametrize(
    ("value", "want", "margin", "p"),
    [
        (0.196, "higher", 0.0, 0.025),  # 1.96 standard errors beyond the border
        (-0.196, "higher", 0.0, 0.975),
        (-0.196, "lower", 0.0, 0.025),
        (0.246, "higher", 0.05, 0.025),
        (0.146, "not lower", 0.05, 0.025),
        (-0.246, "not lower", 0.05, 0.975),
        (-0.146, "not higher", 0.05, 0.025),
        (0.246, "not higher", 0.05, 0.975),
        (0.0, "higher", 0.0, 0.5),
    ],
)
def test_p_value_of_a_comparison(value: float, want: str, margin: float, p: float) -> None:
    assert p_wanted(Estimate(value, 0.1, float("inf")), want, margin) == pytest.approx(p, abs=1e-4)


def pooled_of(
    gains: dict[str, tuple[float, float]], shape: tuple[int, int] = (4, 100), seed: int = 0
) -> Pooled:
    """Arms whose difference from the base over seeds × prompts is normal, with exactly this mean: gain, spread."""
    generator = np.random.default_rng(seed)
    values = np.full((shape[0], 1 + len(gains), shape[1], 1, 1), 0.5)
    for place, (gain, spread) in enumerate(gains.values(), start=1):
        noise = generator.normal(0, spread, size=shape)
        values[:, place, :, 0, 0] += gain + noise - noise.mean()
    settings = [("base", 1.0), *((arm, 1.0) for arm in gains)]
    return Pooled("lab", values, settings, ["en"], ["good"], {"tuned": ["en"], "all": ["en"]})


def study_of(**claims: list[tuple[str, str]]) -> dict[str, object]:
    return {
        name: {"says": name, "tests": [{"arm": arm, "want": want} for arm, want in tests]}
        for name, tests in claims.items()
    }


def verdicts_of(pooled: Pooled, claims: dict[str, object], **study: object) -> dict[str, str]:
    judged = judge_all(Study.model_validate({"claims": claims, **study}), {"one": Runs({"lab": pooled})})
    return {name: one.verdict for name, one in judged.items()}


def test_one_rule_in_both_directions() -> None:
    pooled = pooled_of({"up": (0.2, 0.3), "down": (-0.2, 0.3), "same": (0.0, 0.05), "noisy": (0.0, 2.0)})
    claims = study_of(
        up=[("up", "higher")],
        contrary=[("up", "lower")],
        down=[("down", "higher")],
        same=[("same", "higher")],
        noisy=[("noisy", "higher")],
        # one comparison for and one against: neither direction has both
        mixed=[("up", "higher"), ("down", "higher")],
        both=[("down", "higher"), ("up", "lower")],
    )
    assert verdicts_of(pooled, claims) == {
        "up": HOLDS, "contrary": FAILS, "down": FAILS, "same": EQUIVALENT, "noisy": OPEN, "mixed": OPEN,
        "both": FAILS,
    }  # fmt: skip
    # what counts as equivalent is the study's to say
    assert verdicts_of(pooled, claims, equivalence=0.001)["same"] == OPEN
    # most of three is two
    most = {
        "most": {
            **study_of(most=[("up", "higher"), ("up", "higher"), ("down", "higher")])["most"],
            "need": "most",
        }
    }
    assert verdicts_of(pooled, most) == {"most": HOLDS}


def test_claims_are_corrected_for_their_number_within_a_family() -> None:
    pooled = pooled_of({"weak": (0.045, 0.4), "same": (0.0, 2.0)})
    weak, alike = study_of(weak=[("weak", "higher")])["weak"], study_of(x=[("same", "higher")])["x"]
    assert verdicts_of(pooled, {"weak": weak})["weak"] == HOLDS
    others = {f"other-{n}": alike for n in range(9)}
    assert verdicts_of(pooled, {"weak": weak, **others})["weak"] == OPEN
    secondary = {name: {**claim, "secondary": True} for name, claim in others.items()}
    assert verdicts_of(pooled, {"weak": weak, **secondary})["weak"] == HOLDS
    # what cannot be tested has no verdict and costs the others nothing
    untestable = {name: {**claim, "not_testable": "no."} for name, claim in others.items()}
    found = verdicts_of(pooled, {"weak": weak, **untestable})
    assert (found["weak"], found["other-0"]) == (HOLDS, UNTESTABLE)


def test_of_several_differences_the_one_that_reaches_least_far_is_shown() -> None:
    # the larger one is noisier, so its p-value is the larger one too
    pooled = pooled_of({"small": (0.05, 0.05), "large": (0.2, 0.6)})
    for want, shown in (("higher", "small"), ("lower", "large")):
        claims = study_of(both=[("small", want), ("large", want)])
        study = Study.model_validate({"claims": claims})
        judged = judge_all(study, {"one": Runs({"lab": pooled})})["both"]
        assert judged.deciding("one").comparison.arm == shown


def test_the_base_is_compared_at_its_best_temperature() -> None:
    values = np.zeros((2, 3, 10, 1, 2))
    values[:, 1, :, 0, 0] = 0.6  # the base's headline is best at 0.5
    values[:, 2, :, 0, 0] = 0.4
    values[:, :, :, 0, 1] = 0.1
    settings = [("base", 1.0), ("base", 0.5), ("tuned", 1.0)]
    metrics = ["good", "mode:malformed"]
    pooled = Pooled("lab", values, settings, ["en"], metrics, {"tuned": ["en"], "all": ["en"]})
    headline, mode = Comparison(arm="tuned"), Comparison(arm="tuned", metric="mode:malformed")
    runs = Runs({"lab": pooled})
    assert [test.words for test in run_tests(headline, runs, 0.02)] == ["tuned − base (T = 0.5)"]
    assert [test.words for test in run_tests(mode, runs, 0.02)] == ["tuned − base"]


def values_of(heights: dict[str, float], benchmark: str = "lab", prompts: int = 40) -> Pooled:
    """Arms of exactly these means, each prompt of its own level that all arms share."""
    level = np.random.default_rng(1).normal(0, 0.1, size=(3, 1, prompts, 1, 1))
    values = level - level.mean() + np.array(list(heights.values()))[None, :, None, None, None]
    settings = [(arm, 1.0) for arm in heights]
    return Pooled(benchmark, values, settings, ["en"], ["good"], {"tuned": ["en"], "all": ["en"]})


def test_an_interaction_is_a_difference_of_differences() -> None:
    arms = {"base": 0.3, "rule": 0.7, "min": 0.5, "rule-filtered": 0.8, "min-filtered": 0.75}
    runs = Runs({"lab": values_of(arms)})
    comparison = Comparison(arm="rule", than="min", beyond=("rule-filtered", "min-filtered"))
    (test,) = run_tests(comparison, runs, 0.02)
    assert test.estimate.value == pytest.approx(0.2 - 0.05)
    assert test.words == "(rule − min) − (rule-filtered − min-filtered)"
    assert test.p_wanted < 1e-9
    assert not test.equivalent


def test_a_share_of_a_gain() -> None:
    runs = Runs({"lab": values_of({"base": 0.3, "english": 0.65, "in-language": 0.7})})
    for share, left in ((0.8, 0.03), (0.9, -0.01)):  # 0.35 of a gain of 0.40
        (test,) = run_tests(Comparison(arm="english", than="in-language", share=share), runs, 0.02)
        assert test.estimate.value == pytest.approx(left)
        assert (test.p_wanted < 0.05) == (left > 0)
        assert test.equivalent == (left < 0)
    assert test.words == "gain of english over base (T = 1) − 90 % of that of in-language"


def test_what_has_no_results_is_named_and_a_mode_that_nobody_has_is_zero() -> None:
    runs = Runs({"lab": values_of({"base": 0.3, "tuned": 0.7})})
    (test,) = run_tests(Comparison(arm="tuned", metric="mode:malformed"), runs, 0.02)
    assert (test.estimate.value, test.equivalent) == (0.0, True)
    for wrong, sentence in (
        ({"benchmark": "lab-abilities"}, "'lab-abilities' of a claim has no results, expected one of lab"),
        ({"metric": "goood"}, "'goood' is no metric of 'lab', expected one of good"),
    ):
        with pytest.raises(UserError, match=sentence):
            run_tests(Comparison(arm="tuned", **wrong), runs, 0.02)


def test_a_frontier_leaves_out_what_another_point_beats() -> None:
    points = [(0.0, 0.5), (2.0, 0.8), (1.0, 0.7), (3.0, 0.6), (2.0, 0.8)]  # (KL, quality)
    assert frontier(points, less=True) == [0, 2, 1]
    assert frontier([(0.5, 1.0), (0.8, 0.6), (0.7, 0.9), (0.6, 0.8)], less=False) == [0, 2, 1]  # (gain, kept)


def test_a_curve_between_and_beyond_its_points() -> None:
    points = [(0.0, 0.5), (1.0, 0.7), (3.0, 0.8)]
    assert curve_at(points, 0.5) == (pytest.approx(0.6), {0: 0.5, 1: 0.5}, pytest.approx(0.2))
    assert curve_at(points, 2.0) == (pytest.approx(0.75), {1: 0.5, 2: 0.5}, pytest.approx(0.05))
    assert (curve_at(points, -1.0), curve_at(points, 9.0)) == ((0.5, {0: 1.0}, 0.0), (0.8, {2: 1.0}, 0.0))


def test_two_sweeps_at_equal_kl() -> None:
    """DPO reaches 0.9 at KL 4 and Max-R 0.7 at KL 2, where DPO's curve stands at 0.8."""
    heights = {"base": 0.5, "dpo-a": 0.7, "dpo-b": 0.9, "sft-a": 0.6, "sft-b": 0.7, "sft-c": 0.55}
    kl = {arm: {"en": x} for arm, x in {"dpo-a": 1, "dpo-b": 3, "sft-a": 1, "sft-b": 2, "sft-c": 9}.items()}
    sweeps = {"dpo": ["dpo-a", "dpo-b"], "sft": ["sft-a", "sft-b", "sft-c"]}
    comparison = Comparison(arm="dpo", than="sft", at_equal="kl")
    (test,) = run_tests(comparison, Runs({"lab": values_of(heights)}, sweeps, kl), 0.02)
    assert test.estimate.value == pytest.approx(0.8 - 0.7)
    assert test.words == "dpo − sft at equal kl (2.00)"
    assert test.by_seed == pytest.approx([0.1] * 3)
    assert [x for x, _ in test.curves["sft"]] == [0, 1, 2, 9]


def test_what_is_lost_at_equal_gain_has_an_error_that_covers() -> None:
    """Simulated sweeps of a known law: DPO keeps 1 − gain, SFT 1 − 2·gain; both are read where SFT ends, at 0.3."""
    rates, level = (0.1, 0.2, 0.3), 0.5
    sweeps = {"dpo": [f"dpo-{r}" for r in rates], "sft": [f"sft-{r}" for r in rates]}
    gains = {"base": 0.0} | {
        f"{m}-{r}": r * (4 / 3 if m == "dpo" else 1) for m in ("dpo", "sft") for r in rates
    }
    kept = {arm: 1 - gain * (2 if arm.startswith("sft") else 1) for arm, gain in gains.items()}
    generator, covered, times = np.random.default_rng(4), 0, 200
    comparison = Comparison(arm="dpo", than="sft", at_equal="lab", benchmark="kept")
    for _ in range(times):
        pooled = {}
        for name, means, add, prompts in (("lab", gains, level, 60), ("kept", kept, 0.0, 40)):
            one = values_of(means, name, prompts)
            noise = generator.normal(0, 0.05, size=one.values.shape) + generator.normal(
                0, 0.004, (3, len(means), 1, 1, 1)
            )
            pooled[name] = replace(
                one, values=one.values + add + noise, metrics=["good" if name == "lab" else "score"]
            )
        (test,) = run_tests(comparison, Runs(pooled, sweeps), 0.02)
        covered += test.estimate.interval().low <= 0.3 <= test.estimate.interval().high
    assert 0.9 <= covered / times <= 0.995


def test_the_best_of_a_grid_is_inside_or_at_its_edge() -> None:
    edge = [(x, Interval(value, value, value)) for x, value in ((3.0, 0.5), (1.0, 0.6), (2.0, 0.55))]
    inside = [(x, Interval(value, value, value)) for x, value in ((1.0, 0.5), (2.0, 0.6), (4.0, 0.1))]
    assert _best_places({"tuned": edge}) == "Best at: tuned 1 (at the edge of the grid)."
    assert _best_places({"tuned": inside}) == "Best at: tuned 2."


def test_a_grid_with_one_open_value_has_a_curve_and_says_on_which_prompts_it_was_picked(
    tmp_path: Path,
) -> None:
    path = tmp_path / "grid.toml"
    grid = '\n"training.beta" = [0.3]\n"training.learning_rate" = [1e-3, 2e-3, 9e-3]'
    text = RECIPE.format(folder=tmp_path / "run").replace("\ncompletions = [2, 4]", grid)
    path.write_text(text.replace("[evaluation]", '[evaluation]\nsplit = "dev"'))
    recipe = load(path)
    arms = recipe.sweep["number"].arms
    pooled = values_of({"base": 0.3, **dict(zip(arms, (0.4, 0.6, 0.5), strict=True))})
    (part,) = study.sweep_parts(recipe, pooled)
    assert part.title == "Sweep: training.learning_rate of monolingual, training.beta = 0.3"
    assert part.tables[0].head[:2] == ["training.learning_rate", "decoding"]
    assert part.text == ["Best at: tuned, T = 1 0.002. The best is picked on these dev prompts."]
    assert len(part.panels) == 1


def test_an_arm_far_beyond_the_others_is_in_the_table_of_kl_and_not_in_its_chart() -> None:
    heights = {"base": 0.5, "a": 0.6, "b": 0.7, "c": 0.8, "gone": 0.1}
    kl = {arm: {"en": x} for arm, x in {"a": 1.0, "b": 2.0, "c": 3.0, "gone": 140.0}.items()}
    part = study.kl_part(Runs({"lab": values_of(heights)}, {"grid": ["a", "b", "c", "gone"]}, kl))
    assert [row[0] for row in part.tables[0].rows] == ["base", "a", "b", "c", "gone"]
    assert "in the table only: gone." in part.text[0]
    assert len(part.panels[0].curves[0].dots) == 4


def test_a_claim_holds_only_where_every_study_agrees() -> None:
    up, down, noisy = ({"arm": (gain, spread)} for gain, spread in ((0.2, 0.3), (-0.2, 0.3), (0.1, 2.0)))
    study = Study.model_validate({"claims": study_of(better=[("arm", "higher")])})
    for second, in_both, alone in ((up, HOLDS, HOLDS), (noisy, OPEN, OPEN), (down, OPEN, FAILS)):
        studies = {"one": Runs({"lab": pooled_of(up)}), "two": Runs({"lab": pooled_of(second)})}
        judged = judge_all(study, studies)["better"]
        assert (judged.verdict, judged.alone) == (in_both, {"one": HOLDS, "two": alone})
        part = claim_part("better", judged, studies, 0.02)
        assert f"(one: holds, two: {alone})" in part.text[0]
        assert [row[1] for row in part.tables[0].rows] == ["one", "two"]


def test_without_a_difference_a_family_of_seven_rarely_speaks() -> None:
    """Holm's promise, simulated: at most 5 % of families have a false verdict; and true differences are seen."""
    claims = {f"p{n}": study_of(p=[(f"arm-{n}", "higher")])["p"] for n in range(7)}
    study, generator, wrong, right = Study.model_validate({"claims": claims}), np.random.default_rng(5), 0, 0
    for gain in (0.0, 0.03):
        for _ in range(200):
            pooled = pooled_of({f"arm-{n}": (0.0, 0.0) for n in range(7)}, (8, 150))
            pooled.values[:, 1:] += gain + generator.normal(0, 0.1, (8, 7, 150, 1, 1))
            pooled.values[:, 1:] += generator.normal(0, 0.05, (1, 7, 150, 1, 1)) + generator.normal(
                0, 0.005, (8, 7, 1, 1, 1)
            )
            verdicts = [one.verdict for one in judge_all(study, {"one": Runs({"lab": pooled})}).values()]
            wrong += gain == 0 and bool({HOLDS, FAILS} & set(verdicts))
            right += verdicts.count(HOLDS) if gain else 0
    assert wrong / 200 <= 0.08
    assert right / (7 * 200) > 0.8


def pools_of(*pools: tuple[list[float], list[float]], forms: str = "ab") -> pl.DataFrame:
    """Completions as `read_scores` has them: per pool the scores of one scorer and the verified quality."""
    rows = [
        (0, f"p{number}", "en", place, forms[place % len(forms)], score, quality)
        for number, pool in enumerate(pools)
        for place, (score, quality) in enumerate(zip(*pool, strict=True))
    ]
    columns = ["folder", "prompt_id", "language", "sample_id", "form", "reward", "verified"]
    return pl.DataFrame(rows, columns, orient="row")


def test_ranking_by_hand_and_against_scipy() -> None:
    def figures(*pools: tuple[list[float], list[float]]) -> list[float | None]:
        scored = pools_of(*pools)
        found = [accuracy(scored, ["reward"], ["language"]), *best_and_tau(scored, ["reward"])]
        return [of["reward", "en"][0].value if of else None for of in found]

    # unequal pairs: (0, 2) right, (1, 2) wrong; the best-scored, of two, is at the top by half
    assert figures(([3.0, 1.0, 2.0], [1.0, 1.0, 0.0]))[:2] == [0.5, 1.0]
    assert figures(([2.0, 2.0], [1.0, 0.0])) == [0.5, 0.5, None]
    assert figures(([1.0, 2.0], [1.0, 1.0]))[0] is None
    # the mean over prompts, not over pairs
    assert figures(([2.0, 1.0], [1.0, 0.0]), ([1.0, 2.0, 3.0], [1.0, 0.0, 0.0]))[0] == 0.5
    generator = np.random.default_rng(0)
    for _ in range(20):
        scores, quality = (generator.integers(k, size=12).astype(float).tolist() for k in (5, 3))
        assert figures((scores, quality))[2] == pytest.approx(
            kendalltau(scores, quality).statistic, abs=1e-12
        )


def test_accuracy_within_one_form_and_between_two() -> None:
    """Forms a, b, a, b; by form alone (a over b) the scorer is right, within a form it is not."""
    scored = pools_of(([4.0, 2.0, 3.0, 1.0], [0.9, 0.2, 1.0, 0.4]))
    found = {
        case[1:]: (value.value, pairs) for case, (value, pairs) in accuracy(scored, ["reward"], FORMS).items()
    }
    assert found == {("a", "b"): (1.0, 4), ("a", "a"): (0.0, 1), ("b", "b"): (0.0, 1)}


def test_accuracy_per_pair_of_forms_by_hand(tmp_path: Path) -> None:
    prompt = lab.prompts("dev", ["en"], 1).to_pylist()[0]
    texts = [prompt["reference"], prompt["reference"], "no such sentence", "nor this one"]
    key = {"prompt_id": prompt["prompt_id"], "language": "en"}
    rows = [
        {**key, "sample_id": n, "completion": text, "completion_tokens": 1, "finish_reason": "stop",
         "policy": "p", "seed": n}
        for n, text in enumerate(texts)
    ]  # fmt: skip
    scores = [{**key, "sample_id": n, "score": s, "scorer": "r"} for n, s in enumerate([2.0, 0.0, 1.0, 0.0])]
    verified = [{**row, "score": float(row["sample_id"] < 2)} for row in scores]
    stages = (("sample", COMPLETIONS, rows), ("score", SCORES, scores), ("score/verified", SCORES, verified))
    for stage, table, made in stages:
        (tmp_path / stage).mkdir()
        counts = {"completion": 4}
        arrow = pa.Table.from_pylist(made, schema=table.schema)
        shards.write_shard(
            tmp_path / stage, 0, arrow, table.schema, read=counts, written=counts, dropped=None
        )
    # of four pairs of a good and a malformed one: 2 > 1, 2 > 0, 0 < 1, 0 = 0
    found = accuracy(read_scores([tmp_path], ["reward"]), ["reward"], FORMS)
    assert {case: (interval.value, pairs) for case, (interval, pairs) in found.items()} == {
        ("reward", "good", "malformed"): (2.5 / 4, 4)
    }


def test_the_heuristic_likes_rare_texts_of_usual_length_in_the_letters_of_their_language() -> None:
    english = [
        "the month of may",
        "the month of june",
        "the month of july",
        "the fourth is april",
        "the month of may",
    ]
    danish = [
        "måneden er en maj",
        "måneden er en juni",
        "den fjerde er april",
        "måneden er en juli",
        "the month of may",
    ]
    rows = [
        ("p", code, n, text) for code, of in (("en", english), ("da", danish)) for n, text in enumerate(of)
    ]
    completions = pl.DataFrame(
        rows, schema=["prompt_id", "language", "sample_id", "completion"], orient="row"
    )
    scores = heuristic(completions)
    assert scores.columns == ["prompt_id", "language", "sample_id", "score"]
    of = {(code, n): score for _, code, n, score in scores.iter_rows()}
    assert of["en", 0] == of["en", 4] < of["en", 1]  # the same text twice is less rare than its like
    assert of["da", 4] == min(score for (code, _), score in of.items() if code == "da")  # another language
    short = completions.with_columns(
        pl.when(pl.col("sample_id") == 3).then(pl.lit("the")).otherwise("completion").alias("completion")
    )
    assert heuristic(short).filter(language="en", sample_id=3)["score"][0] < of["en", 3]


def verdicts(folder: Path, arm: str, values: dict[tuple[str, str], float], mode: str = "good") -> None:
    rows = [
        {"arm": arm, "prompt_id": p, "language": code, "temperature": 1.0, "sample_id": 0, "completion": "",
         "finish_reason": "stop", "benchmark": "lab", "mode": mode, "found_language": None, "value": value}
        for (p, code), value in values.items()
    ]  # fmt: skip
    where = folder / "evaluate" / arm
    where.mkdir(parents=True)
    table = pl.DataFrame(rows).to_arrow().cast(VERDICTS.schema)
    counts = {"completion": len(rows)}
    shards.write_shard(where, 0, table, VERDICTS.schema, read=counts, written=counts, dropped=None)


GROUPS = {"tuned": ["en", "da"], "low-resource": [], "held-out": [], "all": ["en", "da"]}


def test_differences_are_paired_over_seeds_and_prompts(tmp_path: Path) -> None:
    base = {
        (prompt, code): float((prompt, code) == ("p", "en")) for prompt in "pqrstu" for code in ("en", "da")
    }
    for seed, gain in ((0, 1.0), (1, 0.5)):
        verdicts(tmp_path / str(seed), "base", base)
        verdicts(tmp_path / str(seed), "tuned", {key: value + gain for key, value in base.items()})
    found = pool([tmp_path / "0", tmp_path / "1"], ["tuned"], GROUPS)["lab"]
    assert found.of(("base", 1.0), "tuned").tolist() == [[0.5, *[0.0] * 5]] * 2
    assert run_tests(Comparison(arm="tuned"), Runs({"lab": found}), 0.02)[0].by_seed == [1.0, 0.5]
    # the same in every prompt: the interval is that of two seeds, Student's t with one degree of freedom
    difference = found.difference(("tuned", 1.0), ("base", 1.0), "da")
    assert difference.value == 0.75
    assert difference.high - 0.75 == pytest.approx(12.706 * 0.25, abs=1e-3)
    assert found.best("base", "en") == ("base", 1.0)


def test_a_claim_on_too_few_prompts_is_not_resolved() -> None:
    few = pooled_of({"up": (0.5, 0.1)})
    few = replace(few, values=few.values[:, :, :5])
    assert not few.difference(("up", 1.0), ("base", 1.0), "tuned").known
    assert verdicts_of(few, study_of(up=[("up", "higher")])) == {"up": OPEN}


def test_seeds_without_a_common_prompt_are_not_averaged(tmp_path: Path) -> None:
    for seed, prompt in ((0, "p"), (1, "q")):
        verdicts(tmp_path / str(seed), "base", {(prompt, "en"): 1.0})
    with pytest.raises(UserError, match="no prompt of 'lab' was evaluated in every arm under every seed"):
        pool([tmp_path / "0", tmp_path / "1"], [], GROUPS)


RECIPE = """
[run]
name = "tiny-study"
folder = "{folder}"
languages = ["en", "da"]
[prompts]
limit = 8
order = "seed"
[sampling]
completions = 4
max_new_tokens = 24
[training]
learning_rate = 1e-3
batch_pairs = 8
max_tokens = 256
[evaluation]
limit = 4
temperatures = [1.0]
max_new_tokens = 24
bootstrap = 100
[arms.monolingual]
[sweep.number]
of = "monolingual"
completions = [2, 4]
[study]
seeds = [3, 4]
transfer = {{ limit = 3, completions = 4 }}
introduction = "<script>alert(1)</script>"
[study.claims.gain]
says = "Pairs help."
tests = [{{ arm = "monolingual", on = ["tuned", "da"] }}]
[runtime]
seeds_at_once = 2
threads = 1
"""


def test_a_page_whose_writing_was_killed_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "study.toml"
    path.write_text(RECIPE.format(folder=tmp_path / "run"))
    recipe, written = load(path), study.files.write_text
    monkeypatch.setattr(study, "complete", lambda recipe: [])
    monkeypatch.setattr(study, "build", lambda recipes: [])

    def killed(path: Path, text: str) -> None:
        if path.suffix == ".html":
            raise KeyboardInterrupt
        written(path, text)

    with monkeypatch.context() as once:
        once.setattr(study.files, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            study.write(recipe)
    assert study.write(recipe).is_file()
    (recipe.folder / "study.md").unlink()
    study.write(recipe)
    assert (recipe.folder / "study.md").is_file()
    (recipe.folder / "study.json").unlink()
    with pytest.raises(UserError, match="is not a page of croco's"):
        study.write(recipe)


def test_what_its_seeds_left_out_is_said_and_only_then(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(RECIPE.format(folder=tmp_path / "run"))
    recipe = load(path)

    def record(folder: Path, **counts: dict[str, int]) -> None:
        files.write_json(folder / "stage.json", {
            "stage": folder.name, "arm": None, "state": "complete", "fingerprint": "x", "seconds": 1.0,
            "science": {"name": "x", "version": 1, "arm": None, "settings": {}, "inputs": {}}, "shard_prompts": 64,
            "num_shards": 1, "counts": {"read": {}, "written": {}, "dropped": {}} | counts, "starts": 1, "facts": {},
        })  # fmt: skip

    run = tmp_path / "run"
    for seed in (3, 4):
        record(run / f"seed-{seed}" / "prompts", read={"prompt": 16})
        record(run / f"seed-{seed}" / "score", read={"completion": 64}, dropped={"flag": 3})
    assert study.left_out(recipe) == ""
    for seed, lost in ((3, 2), (4, 1)):
        record(run / f"seed-{seed}" / "prompts", read={"prompt": 16}, dropped={"prompt": lost})
    record(run / "transfer-4" / "sample", read={"completion": 1200}, dropped={"completion": 1100})
    assert study.left_out(recipe) == "3 of 32 prompts (prompts) and 1,100 of 1,200 completions (sample)"


@pytest.mark.slow
def test_a_study_is_killed_and_goes_on_and_a_second_run_computes_nothing(tmp_path: Path) -> None:
    recipe, run = tmp_path / "study.toml", tmp_path / "run"
    recipe.write_text(RECIPE.format(folder=run))
    command = [sys.executable, "-m", "croco", "run", str(recipe)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 240
        while not (run / "seed-3" / "sample" / "stage.json").exists() and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not (run / "study.html").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600)

    assert {path.name for path in run.iterdir()} >= {
        "seed-3",
        "seed-4",
        "transfer-3",
        "transfer-4",
        "study.md",
    }
    samples = [
        shards.read_table(run / f"seed-{seed}" / "prompts")["prompt_id"].unique().sort() for seed in (3, 4)
    ]
    assert len(samples[0]) == len(samples[1]) == 8
    assert samples[0].to_list() != samples[1].to_list()  # another seed, other prompts
    text = (run / "study.md").read_text()
    for word in (
        "Pairs help.",
        "Sweep: completions of monolingual",
        "Does the reward model transfer?",
        "of the worse: percent ranked right",
        "tiny-study left out ",
        "Danish",
    ):
        assert word in text
    page = (run / "study.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<svg" in page

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    stamp = json.loads((run / "study.json").read_text())
    again = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    assert "study: complete, skipped" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")} == before
    assert json.loads((run / "study.json").read_text()) == stamp

    # the same study under another name stands for that of another policy
    other = shutil.copytree(run, tmp_path / "other")
    recipe_file = other / "recipe.json"
    recipe_file.write_text(recipe_file.read_text().replace('"tiny-study"', '"other-study"'))
    for name in ("both.md", "both.html"):
        shown = CliRunner().invoke(app, ["report", str(run), str(other), "--to", str(tmp_path / name)])
        assert shown.exit_code == 0, shown.output
    text = (tmp_path / "both.md").read_text()
    assert text.startswith("# tiny-study and other-study\n")
    assert "| claim | verdict | tiny-study | other-study | p |" in text
    assert "## What the arms were tuned on, other-study" in text
    same = CliRunner().invoke(app, ["report", str(run), str(run)])
    assert same.exit_code == 2
    assert "the studies are both called 'tiny-study'" in same.stderr


def test_two_studies_must_have_what_the_first_claims(tmp_path: Path) -> None:
    recipes = []
    for name, sweep in (("one", "number"), ("two", "count")):
        recipe = tmp_path / f"{name}.toml"
        text = RECIPE.format(folder=tmp_path / name).replace("[sweep.number]", f"[sweep.{sweep}]")
        equal = 'tests = [{ arm = "number", than = "number", at_equal = "lab" }]'
        recipe.write_text(
            text.replace('tests = [{ arm = "monolingual", on = ["tuned", "da"] }]', equal)
            if name == "one"
            else text
        )
        recipes.append(load(recipe))
    with pytest.raises(
        UserError, match=r"two has not what .*one claims: .*'number' is no sweep, expected one of count"
    ):
        together(recipes, as_markdown=True)


@pytest.mark.parametrize(
    ("said", "instead", "sentence"),
    [
        ('arm = "monolingual", on', 'arm = "mono", on', "'mono' is not evaluated"),
        ('"tuned", "da"]', '"nordic"]', "on = 'nordic', expected a group"),
        ("seeds = [3, 4]", "seeds = [3, 3]", "expected different ones"),
        ("says =", "say =", "did you mean 'study.claims.gain.says'"),
    ],
)
def test_a_claim_about_what_is_not_there(tmp_path: Path, said: str, instead: str, sentence: str) -> None:
    recipe = tmp_path / "study.toml"
    recipe.write_text(RECIPE.format(folder=tmp_path / "run").replace(said, instead))
    with pytest.raises(UserError, match=sentence):
        load(recipe)


def test_a_study_is_ordinary_runs(tmp_path: Path) -> None:
    recipe = tmp_path / "study.toml"
    recipe.write_text(RECIPE.format(folder=tmp_path / "run"))
    found = [(part.folder.name, part.run.seed, part.study, until) for part, until in parts(load(recipe))]
    assert found == [
        ("seed-3", 3, None, None), ("seed-4", 4, None, None),
        ("transfer-3", 3, None, "score"), ("transfer-4", 4, None, "score"),
    ]  # fmt: skip


def test_what_is_for_one_run_is_refused_for_a_study(tmp_path: Path) -> None:
    recipe, run = tmp_path / "study.toml", tmp_path / "run"
    recipe.write_text(RECIPE.format(folder=run))
    files.write_json(run / "recipe.json", load(recipe).model_dump(mode="json"))
    for words in (
        ["sample", recipe],
        ["merge", run, "--arm", "monolingual", "--to", tmp_path / "merged"],
        ["export", run, "--arm", "monolingual", "--to", tmp_path / "pairs"],
        ["report", run, "--csv", tmp_path / "table.csv"],
        ["report", run, "--terminal"],
        ["compare", run, run],
    ):
        said = CliRunner().invoke(app, [str(word) for word in words])
        assert said.exit_code == 2, said.output
        assert "is a study, expected" in said.output
    assert {path.name for path in tmp_path.iterdir()} == {"study.toml", "run"}
