"""EuroEval on a real model, offline: SmolLM2 as it is and tuned, which vLLM serves on loopback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

import real
from croco.storage.files import read_json
from croco.storage.shards import read_table
from stages.euroeval.lab_datasets import make, name_of
from with_euroeval.conftest import PYTHON

pytestmark = pytest.mark.euroeval

RECIPE = """
[run]
name = "euroeval-smollm2"
folder = "{folder}/run"
languages = ["de"]
held_out_languages = ["da"]

[prompts]
source = "{root}/recipes/everyday-train.jsonl.gz"
limit = 12

[policy]
model = "{model}"
dtype = "float32"

[reward]
function = "{root}/recipes/everyday.py:usable"

[sampling]
completions = 4
temperature = 0.7
max_new_tokens = 32

[guards]
wrong_language = "off"
cut = "off"

[training]
updates = 2
batch_pairs = 4
sentinel = {{ enabled = false }}

[evaluation]
source = "{root}/recipes/everyday-test.jsonl.gz"
limit = 2
max_new_tokens = 32
bootstrap = 50
reward = {{ function = "{root}/recipes/everyday.py:usable" }}

[euroeval]
local = "{folder}/local"
datasets = {{ de = ["{de}"], da = ["{da}"] }}
iterations = 2

[arms.tuned]
scorer = "random"

[runtime]
threads = 1

[runtime.euroeval]
python = "{python}"

[runtime.vllm]
enforce_eager = true
max_model_len = 2048
"""


def test_smollm2_and_its_merged_arm_are_evaluated(tmp_path: Path) -> None:
    model = real.smollm2(fetched=True)
    make(tmp_path / "local", limit=24)
    names = {"de": name_of("de"), "da": name_of("da")}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        RECIPE.format(folder=tmp_path, root=real.ROOT, model=model, python=PYTHON.absolute(), **names),
        encoding="utf-8",
    )
    words = [sys.executable, "-m", "croco", "run", str(recipe), "--until", "results"]
    assert subprocess.run(words, timeout=2400).returncode == 0
    results = read_table(tmp_path / "run/results").filter(pl.col("benchmark").is_in(list(names.values())))
    assert set(results.select("arm", "language", "benchmark", "metric").rows()) == {
        (arm, code, name, metric)
        for arm in ("base", "tuned")
        for code, name in names.items()
        for metric in ("test_macro_f1", "test_mcc")
    }
    served = {
        arm: read_json(tmp_path / "run/euroeval" / arm / "stage.json")["facts"]["served_model"]
        for arm in ("base", "tuned")
    }
    assert served["base"] != served["tuned"]
