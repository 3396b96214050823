"""Claims, pooling and transfer by hand; and a whole study of the lab, killed, gone on with, and run again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
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
from croco.report.claims import EQUIVALENT, FAILS, HOLDS, OPEN, UNTESTABLE, judge_all, p_wanted, run_tests
from croco.report.multi_seed import Pooled, pool
from croco.report.transfer import good_over_forms, heuristic, ranking
from croco.stages.evaluate.stats import Interval
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
    assert p_wanted(value, 0.1, want, margin) == pytest.approx(p, abs=1e-4)


def test_a_difference_without_spread_is_certain() -> None:
    assert [p_wanted(value, 0.0, "higher", 0.0) for value in (0.1, 0.0, -0.1)] == [0.0, 0.5, 1.0]


def pooled_of(gains: dict[str, tuple[float, float]]) -> Pooled:
    """Arms whose difference from the base is normal over 4 seeds × 100 prompts: gain, spread."""
    generator = np.random.default_rng(0)
    values = np.full((4, 1 + len(gains), 100, 1, 1), 0.5)
    for place, (gain, spread) in enumerate(gains.values(), start=1):
        noise = generator.normal(0, spread, size=(4, 100))
        values[:, place, :, 0, 0] += gain + noise - noise.mean()
    settings = [("base", 1.0), *((arm, 1.0) for arm in gains)]
    return Pooled("lab", values, settings, ["en"], ["good"], {"tuned": ["en"], "all": ["en"]}, 500)


def study_of(**claims: list[tuple[str, str]]) -> dict[str, object]:
    return {
        name: {"says": name, "tests": [{"arm": arm, "want": want} for arm, want in tests]}
        for name, tests in claims.items()
    }


def verdicts_of(pooled: Pooled, claims: dict[str, object], **study: object) -> dict[str, str]:
    judged = judge_all(Study.model_validate({"claims": claims, **study}), {"lab": pooled})
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
    pooled = pooled_of({"weak": (0.08, 0.4), "same": (0.0, 2.0)})
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


def test_the_base_is_compared_at_its_best_temperature() -> None:
    values = np.zeros((2, 3, 10, 1, 2))
    values[:, 1, :, 0, 0] = 0.6  # the base's headline is best at 0.5
    values[:, 2, :, 0, 0] = 0.4
    values[:, :, :, 0, 1] = 0.1
    settings = [("base", 1.0), ("base", 0.5), ("tuned", 1.0)]
    metrics = ["good", "mode:malformed"]
    pooled = Pooled("lab", values, settings, ["en"], metrics, {"tuned": ["en"], "all": ["en"]}, 50)
    headline, mode = Comparison(arm="tuned"), Comparison(arm="tuned", metric="mode:malformed")
    assert [test.rival for test in run_tests(headline, pooled, 0.02)] == [("base", 0.5)]
    assert [test.rival for test in run_tests(mode, pooled, 0.02)] == [("base", 1.0)]


def test_ranking_by_hand_and_against_scipy() -> None:
    # unequal pairs: (0, 2) right, (1, 2) wrong; the best-scored, of two, is at the top by half
    right, best, _ = ranking(np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0]), 1.0)
    assert (right, best) == (0.5, 1.0)
    assert ranking(np.array([2.0, 2.0]), np.array([1.0, 0.0]), 1.0)[:2] == (0.5, 0.5)
    assert np.isnan(ranking(np.array([1.0, 2.0]), np.array([1.0, 1.0]), 1.0)[0])
    generator = np.random.default_rng(0)
    for _ in range(50):
        scores, quality = (
            generator.integers(5, size=12).astype(float),
            generator.integers(3, size=12).astype(float),
        )
        assert ranking(scores, quality, 2.0)[2] == pytest.approx(
            kendalltau(scores, quality).statistic, abs=1e-12
        )


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
    for stage, table, made in (("sample", COMPLETIONS, rows), ("score", SCORES, scores)):
        (tmp_path / stage).mkdir()
        counts = {"completion": 4}
        arrow = pa.Table.from_pylist(made, schema=table.schema)
        shards.write_shard(
            tmp_path / stage, 0, arrow, table.schema, read=counts, written=counts, dropped=None
        )
    # of four pairs of a good and a malformed one: 2 > 1, 2 > 0, 0 < 1, 0 = 0
    shares = good_over_forms([tmp_path], ["reward"])
    assert {case: interval.value for case, interval in shares.items()} == {("reward", "malformed"): 2.5 / 4}


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
    found = pool([tmp_path / "0", tmp_path / "1"], ["tuned"], GROUPS, 200)["lab"]
    assert found.of(("base", 1.0), "tuned").tolist() == [[0.5, *[0.0] * 5]] * 2
    assert found.by_seed(("tuned", 1.0), ("base", 1.0), "tuned") == [1.0, 0.5]
    # the same in every prompt: the interval is that of two seeds
    difference, error = found.difference(("tuned", 1.0), ("base", 1.0), "da")
    assert difference == Interval(0.75, 0.5, 1.0)
    assert error == pytest.approx(0.25 / 2**0.5, abs=0.02)  # 200 resamples
    assert found.best("base", "en") == ("base", 1.0)


def test_a_claim_on_too_few_prompts_is_not_resolved() -> None:
    few = pooled_of({"up": (0.5, 0.1)})
    few = Pooled("lab", few.values[:, :, :5], few.settings, few.languages, few.metrics, few.groups, 50)
    assert not few.difference(("up", 1.0), ("base", 1.0), "tuned")[0].known
    assert verdicts_of(few, study_of(up=[("up", "higher")])) == {"up": OPEN}


def test_seeds_without_a_common_prompt_are_not_averaged(tmp_path: Path) -> None:
    for seed, prompt in ((0, "p"), (1, "q")):
        verdicts(tmp_path / str(seed), "base", {(prompt, "en"): 1.0})
    with pytest.raises(UserError, match="no prompt of 'lab' was evaluated in every arm under every seed"):
        pool([tmp_path / "0", tmp_path / "1"], [], GROUPS, 50)


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
        "percent of pairs with the good one above",
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
