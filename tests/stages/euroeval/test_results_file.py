"""EuroEval's file read strictly: what it wrote once, and what is wrong with others; and the section of the recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from croco.config.evaluation import VERSION
from croco.config.load import from_dict
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.stages.euroeval import worker
from croco.stages.euroeval.results_file import in_all_arms, read_records, rows_of

WROTE = (
    Path(__file__).parent / "data" / "euroeval_benchmark_results.jsonl"
)  # by EuroEval, in `make test-euroeval`
MODEL = "openai/croco-base"
ASKED = {"iterations": 3, "split": "test", "few_shot": True}
DA, DE = "croco-category-da", "croco-category-de"


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in WROTE.read_text(encoding="utf-8").splitlines()]


def written(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_every_metric_keeps_its_name_value_and_interval() -> None:
    records = read_records(WROTE, MODEL)
    assert sorted(records) == [DA, DE]
    for line in lines():
        dataset = line["evaluation_results"][0]["source_data"]["dataset_name"]
        rows = rows_of(records[dataset], "base", dataset[-2:], ASKED)
        assert [row["metric"] for row in rows] == ["test_mcc", "test_macro_f1"]
        raw = json.loads(line["eval_library"]["additional_details"]["raw_results"])
        for row, metric in zip(rows, line["evaluation_results"], strict=True):
            values = torch.tensor(
                [one[row["metric"].removeprefix("test_")] for one in raw], dtype=torch.float64
            )
            half = 1.96 * values.std() / len(values) ** 0.5
            assert row["value"] == metric["score_details"]["score"]
            # in percent, as EuroEval shows them
            assert row["value"] == pytest.approx(100 * float(values.mean()))
            assert (row["ci_high"] - row["ci_low"]) / 2 == pytest.approx(100 * float(half))
            assert (row["n"], row["temperature"], row["benchmark"]) == (3, 0.0, dataset)


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    line = lines()[0]
    change(line)
    return line


def set_raw(line: dict[str, Any], change: Callable[[list[dict[str, Any]]], Any]) -> None:
    details = line["eval_library"]["additional_details"]
    raw = json.loads(details["raw_results"])
    change(raw)
    details["raw_results"] = json.dumps(raw)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda line: line["eval_library"].update(version="17.0.1"), f"written by EuroEval 17.0.1, expected {VERSION}"),
        (lambda line: line.pop("eval_library"), r"line 1: written by EuroEval \(unknown\)"),
        (lambda line: line["model_info"].update(name="openai/other"), "results of 'openai/other', expected"),
        (lambda line: line.update(evaluation_results=[]), "no result of EuroEval .*evaluation_results"),
        (lambda line: line["evaluation_results"][0].pop("score_details"), "evaluation_results.0.score_details"),
        (lambda line: line["evaluation_results"][1].update(evaluation_name="test_mcc"), "'test_mcc' 2 times"),
        (lambda line: set_raw(line, list.pop), "has 2 iterations, expected 3"),
        (lambda line: set_raw(line, lambda raw: raw[1].update(mcc=None)), "'test_mcc' is a mean over 2 of 3"),
        (lambda line: set_raw(line, lambda raw: raw[1].pop("macro_f1")), "'test_macro_f1' is a mean over 2 of 3"),
        (lambda line: line["eval_library"]["additional_details"].update(few_shot="false"), "few_shot = false"),
        (lambda line: line["eval_library"]["additional_details"].update(validation_split="true"), "other split"),
        (lambda line: line["eval_library"]["additional_details"].update(languages='["fr"]'), "is in fr, expected da"),
        (
            lambda line: line["evaluation_results"][0]["score_details"].update(score=float("nan")),
            "'test_mcc' is nan without an interval",
        ),
        (
            lambda line: line["evaluation_results"][0]["score_details"]["uncertainty"].pop("confidence_interval"),
            "without an interval",
        ),
    ],
)  # fmt: skip
def test_what_does_not_belong_is_one_sentence(
    change: Callable[[dict[str, Any]], Any], sentence: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "results.jsonl", changed(change))
    with pytest.raises(UserError, match=sentence):
        rows_of(read_records(path, MODEL)[DA], "base", "da", ASKED)


def test_results_of_16_a_second_line_and_a_cut_line_are_refused(tmp_path: Path) -> None:
    old = {
        "dataset": "dala",
        "model": MODEL,
        "results": {"total": {"test_mcc": 1.0}},
        "euroeval_version": "16.11.0",
    }
    with pytest.raises(UserError, match=f"written by EuroEval 16.11.0, expected {VERSION}"):
        read_records(written(tmp_path / "old.jsonl", old), MODEL)
    with pytest.raises(UserError, match=f"line 2: '{DA}' a second time"):
        read_records(written(tmp_path / "twice.jsonl", lines()[0], lines()[0]), MODEL)
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(WROTE.read_bytes()[:-40])
    with pytest.raises(UserError, match="line 2: expected JSON"):
        read_records(cut, MODEL)
    worker.drop_unfinished_line(cut)
    assert list(read_records(cut, MODEL)) == [DA]


def test_norwegian_is_one_collection(tmp_path: Path) -> None:
    line = changed(
        lambda line: line["eval_library"]["additional_details"].update(languages='["nb", "nn", "no"]')
    )
    record = read_records(written(tmp_path / "no.jsonl", line), MODEL)[DA]
    assert {row["language"] for row in rows_of(record, "base", "nb", ASKED)} == {"nb"}


def test_nothing_is_compared_over_unequal_sets() -> None:
    rows = [
        (arm, "da", dataset, metric, 3)
        for arm in ("base", "a")
        for dataset in ("whole", "one-arm", "one-metric")
        for metric in ("test_em", "test_f1")
        if (arm, dataset) != ("a", "one-arm") and (arm, dataset, metric) != ("a", "one-metric", "test_f1")
    ]
    frame = pl.DataFrame(rows, schema=["arm", "language", "benchmark", "metric", "n"], orient="row")
    kept, left_out = in_all_arms(frame, num_arms=2)
    assert kept["benchmark"].unique().to_list() == ["whole"]
    assert left_out == ["one-arm", "one-metric"]
    assert in_all_arms(frame.filter(pl.col("arm") == "base"), num_arms=2)[0].is_empty()


# The recipe ----------------------------------------------------------------------------------------------------------


def recipe_with(**section: Any) -> Recipe:
    run = {
        "name": "x",
        "languages": ["en", "da"],
        "low_resource_languages": ["gl"],
        "held_out_languages": ["nb"],
    }
    return from_dict({"run": run, "arms": {"a": {}}, "euroeval": section})


def test_the_papers_datasets_are_the_default_and_some_languages_have_none() -> None:
    section = recipe_with().euroeval
    assert section is not None
    assert [len(section.datasets_of(code)) for code in ("en", "da", "nb", "pt-BR", "gl", "cy", "mt", "ga")] == [
        7, 8, 5, 4, 0, 0, 0, 0
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"datasets": {"fr": ["fquad"]}}, "euroeval.datasets.fr: not evaluated"),
        ({"datasets": {"en": ["squad"], "da": ["squad"]}}, "'squad' appears twice"),
        ({"datasets": {"en": ["lab-own"]}}, "begins like a benchmark of our own"),
        ({"datasets": {"en": ["../x"]}}, "euroeval.datasets.en"),
        ({"datasets": {}}, "euroeval has no dataset in en, da, gl, nb"),
        ({"iterations": 1}, "expected at least 2"),
    ],
)
def test_a_recipe_that_cannot_be_meant(section: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        recipe_with(**section)
