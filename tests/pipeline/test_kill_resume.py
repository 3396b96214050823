"""SIGKILL at random moments, then the same command again: the same tables as an undisturbed run, bit for bit.

The processes are real, and so are the models (a tiny Llama policy, a tiny Qwen3 reward model). They are forked from a
server that has imported torch, because an import takes longer than the whole run. Every stage is killed after a random
share of the time that it takes: `sample` and `score` several times, the others once.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import killed
from conftest import TinyModels, write_recipe
from croco.config.load import load
from croco.pipeline import run as pipeline

# no Polars and no PyArrow here: what they start does not outlive a fork
PRELOADED = [
    "torch",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "peft",
    "matplotlib.pyplot",
]
SECONDS = 240


def start(recipe: Path, log: Path, *counted: object) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=killed.croco, args=(["run", str(recipe)], str(log), *counted))
    process.start()
    return process


def kill_in(process: multiprocessing.process.BaseProcess, folder: Path, seconds: float) -> bool:
    """Wait until a stage has begun in this process and some time more, then SIGKILL; False if the process ended."""
    record = folder / "stage.json"
    before = record.stat().st_mtime_ns if record.exists() else 0
    end = time.monotonic() + SECONDS
    while process.is_alive() and time.monotonic() < end:
        if record.exists() and record.stat().st_mtime_ns != before:
            time.sleep(seconds)
            break
        time.sleep(0.001)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def stages(run: Path) -> list[Path]:
    return sorted(path.parent.relative_to(run) for path in run.rglob("stage.json"))


def running(run: Path) -> str:
    """The stage that a killed process left, if any."""
    found = [str(stage) for stage in stages(run) if read(run / stage / "stage.json")["state"] == "running"]
    return found[0] if found else "between stages"


@pytest.mark.slow
def test_killed_again_and_again_a_run_ends_as_if_nothing_had_been(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    log = tmp_path / "log.txt"
    calm = start(write_recipe(tmp_path, tiny_models, "calm.toml", "calm"), log)
    calm.join(SECONDS)
    assert calm.exitcode == 0, log.read_text()

    recipe, run = write_recipe(tmp_path, tiny_models, "killed.toml", "killed"), tmp_path / "killed"
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    where = []
    for node in pipeline.nodes(load(recipe)):
        stage = node.folder.relative_to(run)
        took = read(tmp_path / "calm" / stage / "stage.json")["seconds"]
        for _ in range(3 if node.title in ("sample", "score") else 1):
            if (run / stage / "stage.json").exists() and read(run / stage / "stage.json")[
                "state"
            ] == "complete":
                break  # nothing is left to kill
            process = start(recipe, log)
            killed_it = kill_in(process, run / stage, rng.uniform(0, took))
            assert killed_it or process.exitcode == 0, (seed, stage, log.read_text())
            where.append(running(run) if killed_it else "nothing: it had ended")
    print(f"seed {seed}: killed in {', '.join(where)}")
    last = start(recipe, log)
    last.join(SECONDS)
    assert last.exitcode == 0, (seed, log.read_text())
    assert len(set(where)) >= 5

    assert stages(run) == stages(tmp_path / "calm")
    for stage in stages(run):
        compare(tmp_path / "calm" / stage, run / stage, f"seed {seed}: {stage}")
    leftovers = [path for path in run.rglob("*") if path.name.startswith(".tmp-") or path.name == "scratch"]
    assert leftovers == []


@pytest.mark.slow
def test_killed_before_chosen_system_calls_a_run_ends_as_if_nothing_had_been(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    log, calls = tmp_path / "log.txt", tmp_path / "calls.txt"
    calm = start(write_recipe(tmp_path, tiny_models, "calm.toml", "calm"), log, str(calls))
    calm.join(SECONDS)
    assert calm.exitcode == 0, log.read_text()
    made = calls.read_text().splitlines()
    recipe, run = write_recipe(tmp_path, tiny_models, "killed.toml", "killed"), tmp_path / "killed"
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    where = []
    for number in range(8):  # each start makes what is left: the calls get fewer
        process = start(recipe, log, str(calls), rng.randrange(1, max(2, len(made) // (number + 1))))
        process.join(SECONDS)
        assert process.exitcode in (0, -signal.SIGKILL), (seed, log.read_text())
        where.append(calls.read_text().splitlines()[-1])
    print(f"seed {seed}: killed after {'; '.join(where)}")
    last = start(recipe, log)
    last.join(SECONDS)
    assert last.exitcode == 0, (seed, log.read_text())
    assert stages(run) == stages(tmp_path / "calm")
    for stage in stages(run):
        compare(tmp_path / "calm" / stage, run / stage, f"seed {seed}: {stage}")
    leftovers = [path for path in run.rglob("*") if path.name.startswith(".tmp-") or path.name == "scratch"]
    assert leftovers == []


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def compare(calm: Path, killed: Path, what: str) -> None:
    """The same tables in the same shards, the same ledger and counts, the same adapter and metrics."""
    for key in ("state", "fingerprint", "counts", "num_shards"):
        assert read(calm / "stage.json")[key] == read(killed / "stage.json")[key], (what, key)
    names = sorted(path.name for path in calm.glob("*.parquet"))
    assert names == sorted(path.name for path in killed.glob("*.parquet")), what
    for name in names:
        ours, theirs = pq.read_table(killed / name), pq.read_table(calm / name)
        assert ours.equals(theirs), (what, name)
    adapter = calm / "adapter" / "adapter_model.safetensors"
    if calm.parent.name == "train":
        from safetensors.torch import load_file

        ours, theirs = load_file(killed / "adapter" / adapter.name), load_file(adapter)
        assert ours.keys() == theirs.keys(), what
        for name, weight in theirs.items():
            assert weight.equal(ours[name]), (what, name, (weight - ours[name]).abs().max())
        assert weight.abs().sum() > 0
