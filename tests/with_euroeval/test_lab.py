"""EuroEval itself, offline: it evaluates the lab's policy and a tuned one, which vLLM serves on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import psutil
import pytest

from croco.config.load import load
from croco.models import vllm_server
from croco.storage.files import read_json
from croco.storage.hashing import folder_identity
from croco.storage.shards import read_dropped, read_table
from stages.euroeval.lab_datasets import make, name_of
from with_euroeval.conftest import PYTHON

pytestmark = pytest.mark.euroeval

RECIPE = """
[run]
name = "euroeval"
folder = "{folder}/run"
languages = ["da", "de"]
low_resource_languages = ["ga", "mt"]

[prompts]
limit = 12

[policy]
dtype = "float32"

[sampling]
completions = 8
max_new_tokens = 48

[training]
learning_rate = 1e-3
nll_weight = 1.0
max_tokens = 256
batch_pairs = 8

[evaluation]
limit = 4
max_new_tokens = 48
bootstrap = 50

[euroeval]
local = "{folder}/local"
datasets = {{ da = ["{da}"], de = ["{de}"] }}
iterations = 3

[arms.tuned]

[runtime.euroeval]
python = "{python}"

[runtime.vllm]
enforce_eager = true
"""


def croco(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "croco", *words], start_new_session=True)


def finish(process: subprocess.Popen[bytes]) -> None:
    assert process.wait(1500) == 0


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_killed_evaluation_goes_on_with_the_next_dataset_and_both_arms_are_in_the_results(
    tmp_path: Path,
) -> None:
    make(tmp_path / "local")
    recipe, base = tmp_path / "recipe.toml", tmp_path / "run/euroeval/base"
    text = RECIPE.format(folder=tmp_path, da=name_of("da"), de=name_of("de"), python=PYTHON.absolute())
    recipe.write_text(text, encoding="utf-8")

    first = croco("euroeval", "run", str(recipe), "--arm", "base")
    end = time.monotonic() + 900
    while not (base / "part-00000.done").exists():
        assert first.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    started = psutil.Process(first.pid).children(recursive=True)
    assert len(started) >= 2
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive, "nobody else would free their memory"
    assert read_json(base / "stage.json")["state"] == "running"
    earlier = lines(base / "scratch/work/euroeval_benchmark_results.jsonl")

    finish(croco("run", str(recipe), "--until", "results"))
    found = lines(base / "euroeval_benchmark_results.jsonl")
    assert found[: len(earlier)] == earlier, "a finished dataset is not evaluated again"
    assert len(found) == 2

    made = read_json(base / "stage.json")
    assert made["facts"]["euroeval"]["euroeval"] == "18.3.0"
    tuned = read_json(tmp_path / "run/euroeval/tuned/stage.json")["facts"]
    assert made["facts"]["served_model"] == made["science"]["settings"]["policy"]["model"]
    adapter = tmp_path / "run/train/tuned/adapter"
    merged = vllm_server.merge(load(recipe).policy, "float32", adapter, tmp_path / "merged")
    assert tuned["served_model"] == folder_identity(merged) != made["facts"]["served_model"]
    assert made["counts"]["read"] == {"dataset": 2, "language": 4}
    assert read_dropped(base)["language"].to_list() == ["ga", "mt"]
    results = read_table(tmp_path / "run/results").filter(pl.col("benchmark").str.starts_with("croco-"))
    kinds = results.select("arm", "language", "benchmark", "metric").rows()
    assert sorted(kinds) == [
        (arm, code, name_of(code), metric)
        for arm in ("base", "tuned")
        for code in ("da", "de")
        for metric in ("test_macro_f1", "test_mcc")
    ]
    for line in found:
        for metric in line["evaluation_results"]:
            row = results.row(
                by_predicate=(pl.col("arm") == "base")
                & (pl.col("benchmark") == metric["source_data"]["dataset_name"])
                & (pl.col("metric") == metric["evaluation_name"]),
                named=True,
            )
            assert row["value"] == metric["score_details"]["score"]
            assert row["ci_low"] <= row["value"] <= row["ci_high"]
