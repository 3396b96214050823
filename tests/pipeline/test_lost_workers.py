"""SIGKILL to workers and to the driver of a real run with two workers: the tables of one process, bit for bit.

The command line, tiny models of real architectures, and the processes that a machine out of memory would take. While
stages run, a worker is killed in the middle of `sample`, then the driver; the next start goes on, and loses all its
workers at once in the middle of `score`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

import tiny
from conftest import TinyModels, write_prompts, write_recipe

SECONDS = 300
NUM_SHARDS = 36
WORKER = {"local": "spawn_main", "ray": "ray::MapWorker"}  # in the command line of a worker's process


def start(recipe: Path, executor: str, run: Path, replicas: int = 2) -> subprocess.Popen[bytes]:
    settings = {"run.folder": run, "runtime.executor": executor, "runtime.replicas": replicas}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "croco", "run", str(recipe), "--until", "score", *words],
            stdout=log,
            stderr=log,
        )


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, tiny_models: TinyModels) -> tuple[Path, Path]:
    """A recipe whose stages take a while, and the folder of its undisturbed run in one process."""
    folder = tmp_path_factory.mktemp("lost-workers")
    reward = tiny.make_reward("qwen3", hidden=192, layers=6)
    models = TinyModels(
        policy=tiny_models.policy,
        reward=tiny.save(folder / "reward", reward, tiny.make_tokenizer()),
        prompts=write_prompts(folder / "prompts.jsonl", NUM_SHARDS // 2),
        test_prompts=tiny_models.test_prompts,
    )
    recipe = write_recipe(folder, models)
    text = recipe.read_text(encoding="utf-8").replace("shard_prompts = 4", "shard_prompts = 1")
    recipe.write_text(text[: text.index("[arms.likelihood]")] + text[text.index("[runtime]") :], "utf-8")
    assert start(recipe, "local", folder / "calm", replicas=1).wait(SECONDS) == 0
    return recipe, folder / "calm"


def finished(stage: Path) -> dict[str, int]:
    """The finished shards of a stage, and when each was."""
    return {path.name: path.stat().st_mtime_ns for path in stage.glob("part-*.done")}


def until(ready: Callable[[], bool], driver: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SECONDS
    while not ready():
        assert driver.poll() is None, "the run has ended"
        assert time.monotonic() < end
        time.sleep(0.002)


def workers(driver: subprocess.Popen[bytes], executor: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if WORKER[executor] in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_killed_workers_and_a_killed_driver_change_nothing(
    tmp_path: Path, calm: tuple[Path, Path], executor: str
) -> None:
    recipe, undisturbed = calm
    run, log = tmp_path / "run", tmp_path / "run.log"
    sample, score = run / "sample", run / "score"

    driver = start(recipe, executor, run)
    until(lambda: len(finished(sample)) >= 6, driver)
    workers(driver, executor)[0].kill()
    before_first = finished(sample)
    until(lambda: len(finished(sample)) >= len(before_first) + 8, driver)
    family = psutil.Process(driver.pid).children(recursive=True)
    bereaved = workers(driver, executor)
    driver.kill()
    driver.wait()
    assert psutil.wait_procs(bereaved, timeout=30)[1] == [], "workers outlive their driver"
    before_second = finished(sample)
    assert len(before_second) < NUM_SHARDS
    assert before_first.items() <= before_second.items()

    driver = start(recipe, executor, run)
    until(lambda: len(finished(score)) >= 2, driver)
    for worker in workers(driver, executor):
        worker.kill()
    before_third = finished(score)
    family += psutil.Process(driver.pid).children(recursive=True)
    assert driver.wait(SECONDS) == 0, log.read_text()
    assert (
        psutil.wait_procs(family, timeout=120)[1] == []
    )  # two of Ray's agents look for a lost cluster for long
    assert len(before_third) < NUM_SHARDS
    assert before_second.items() <= finished(sample).items(), "a finished shard was made again"
    assert before_third.items() <= finished(score).items(), "a finished shard was made again"

    for stage in ("sample", "score"):
        names = sorted(path.name for path in (undisturbed / stage).glob("*.parquet"))
        assert names == sorted(path.name for path in (run / stage).glob("*.parquet"))
        for name in names:
            assert pq.read_table(run / stage / name).equals(pq.read_table(undisturbed / stage / name)), name
        ours, theirs = (json.loads((f / stage / "stage.json").read_text()) for f in (run, undisturbed))
        assert (ours["counts"], ours["fingerprint"]) == (theirs["counts"], theirs["fingerprint"])
        assert ours["facts"]["executor"] == executor
