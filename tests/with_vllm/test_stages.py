"""A whole run with every engine in vLLM, and one that is killed and goes on: tables, ledgers, seeds, processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import psutil
import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from conftest import TinyModels, write_prompts, write_recipe
from croco.config.load import load
from croco.models.chat_template import conversation_ids, prompt_ids
from croco.models.loading import load_policy, load_reward
from croco.models.protocols import Decoding, Request
from croco.models.transformers import HFSampler
from croco.pipeline import run as pipeline
from croco.storage import files, shards
from with_vllm.wide import engines_of, log_tail, overrides

KEY = ["prompt_id", "language", "sample_id"]


@pytest.fixture(scope="module")
def run(wide_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, one of whose prompts fills the context."""
    folder = tmp_path_factory.mktemp("run")
    prompts = write_prompts(folder / "prompts.jsonl", 10)
    row = {"prompt_id": "p3", "language": "en", "messages": [{"role": "user", "content": "Hej " * 600}]}
    lines = [line for line in prompts.read_text().splitlines() if '"p3", "language": "en"' not in line]
    prompts.write_text("\n".join([*lines, json.dumps(row)]))
    # without the likelihood arm: it is scored by transformers
    recipe = write_recipe(folder, wide_models)
    text = recipe.read_text().replace('[arms.likelihood]\npool = "all"\nscorer = "likelihood"\n', "")
    recipe.write_text(text)
    loaded = load(recipe, [f"prompts.source={prompts}", *overrides("sample", "score", "evaluate")])
    before = engines_of(os.getpid())
    pipeline.run(loaded)
    assert engines_of(os.getpid()) == before  # each ended with its stage
    return loaded.folder


def facts(run: Path, stage: str) -> dict:
    return files.read_json(run / stage / "stage.json")["facts"]


def test_the_tables_are_those_of_any_engine(run: Path, wide_models: TinyModels) -> None:
    completions, dropped = shards.read_table(run / "sample"), shards.read_dropped(run / "sample")
    assert completions.height == 19 * 12
    assert not completions.select(KEY).is_duplicated().any()
    assert dropped.select("prompt_id", "language").unique().rows() == [("p3", "en")]
    assert dropped["sample_id"].sort().to_list() == list(range(12))
    assert (
        dropped["reason"].str.contains(r"^the prompt fills the context of .*, 512 tokens: it has \d+$").all()
    )
    tokenizer = load_policy(str(wide_models.policy))[1]
    for row in completions.iter_rows(named=True):
        assert row["completion_tokens"] == len(row["completion_ids"]) + (row["finish_reason"] == "stop")
        assert row["finish_reason"] == "stop" or row["completion_tokens"] == 40
        assert row["completion"] == tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
    assert completions["completion"].n_unique() > 0.9 * completions.height
    found = facts(run, "sample")
    assert found["engine"] == "vllm"
    assert found["device"] == "cpu"
    assert found["tokens"] == completions["completion_tokens"].sum()
    assert completions["seed"].unique().to_list() == [found["engine_seed"]]


def test_the_scores_are_those_of_transformers(run: Path, wide_models: TinyModels) -> None:
    import torch

    model, tokenizer = load_reward(str(wide_models.reward))
    messages = {
        (row["prompt_id"], row["language"]): row["messages"]
        for row in shards.read_table(run / "prompts").to_dicts()
    }
    scores = shards.read_table(run / "score").join(shards.read_table(run / "sample"), on=KEY, validate="1:1")
    assert scores.height == 19 * 12
    for row in scores.iter_rows(named=True):
        ids = conversation_ids(tokenizer, messages[row["prompt_id"], row["language"]], row["completion"])
        with torch.inference_mode():
            assert row["score"] == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-4)
    assert facts(run, "score")["engine"] == "vllm"


def test_an_arm_is_evaluated_with_its_adapter(run: Path, wide_models: TinyModels) -> None:
    """Greedy completions of the tuned arm are the merged model's, and not the base's."""
    adapter = run / "train" / "monolingual" / "adapter"
    prompts = shards.read_table(run / "eval-prompts").sort("prompt_id", "language").to_dicts()
    said = {}
    for arm, its_adapter in (("base", None), ("monolingual", adapter)):
        model, tokenizer = load_policy(str(wide_models.policy), adapter=its_adapter)
        asked = [Request(i, prompt_ids(tokenizer, row["messages"]), [0]) for i, row in enumerate(prompts)]
        wanted = dict(HFSampler(model, tokenizer).sample(asked, Decoding(0.0, 1.0, 0, 12)))
        greedy = shards.read_table(run / "evaluate" / arm).filter(pl.col("temperature") == 0).sort(KEY)
        said[arm] = greedy["completion"].to_list()
        assert said[arm] == [
            tokenizer.decode(wanted[i][0].ids, skip_special_tokens=True) for i in range(len(prompts))
        ]
        assert facts(run, f"evaluate/{arm}")["engine"] == "vllm"
    assert said["base"] != said["monolingual"]
    assert facts(run, "evaluate/base")["engine_seed"] != facts(run, "sample")["engine_seed"]


def test_killed_it_leaves_no_engine_behind_and_goes_on(wide_models: TinyModels, tmp_path: Path) -> None:
    """SIGKILL once a shard is there: vLLM's processes end too, and the next start does the rest from another seed."""
    words = [
        f"--set={one}"
        for one in [*overrides("sample"), "runtime.shard_prompts=1", "sampling.completions=400"]
    ]
    recipe, log = write_recipe(tmp_path, wide_models), tmp_path / "log.txt"
    command = [sys.executable, "-m", "croco", "sample", str(recipe), *words]
    subprocess.run([*command[:3], "prompts", str(recipe), *words], check=True)
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    folder = tmp_path / "run" / "sample"
    wait_for(lambda: shards.shards(folder) or process.poll() is not None, 300)
    engines = engines_of(process.pid)
    process.kill()
    process.wait()
    before = {shard.path: shard.path.read_bytes() for shard in shards.shards(folder)}
    assert 0 < len(before) < 20, log_tail(log)
    assert len(engines) >= 2  # the engine and its worker
    wait_for(lambda: not any(map(psutil.pid_exists, engines)), 30)

    with log.open("w") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=True)
    for path, content in before.items():
        assert path.read_bytes() == content
    completions = shards.read_table(folder)
    wanted = pl.DataFrame({"sample_id": pl.Series(range(400), dtype=pl.Int32)}).join(
        shards.read_table(tmp_path / "run" / "prompts", KEY[:2]), how="cross"
    )
    assert completions.select(KEY).sort(KEY).equals(wanted.select(KEY).sort(KEY))
    found = files.read_json(folder / "stage.json")
    assert found["counts"] == {"read": {"completion": 8000}, "written": {"completion": 8000}, "dropped": {}}
    assert completions["seed"].n_unique() == found["starts"] == 2


def wait_for(true: object, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
