"""Workers in other processes, real ones that are really killed: nothing is lost, doubled or hidden."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from croco.config.runtime import Runtime
from croco.errors import UserError
from croco.pipeline import stage
from croco.pipeline.compute import gpu_shares
from croco.pipeline.node import Node, Stage
from croco.pipeline.workers import groups
from croco.storage import shards
from toy_workers import NUM_SHARDS, UNLUCKY

LOCAL = "local"
EXECUTORS = [LOCAL, pytest.param("ray", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    """The toys can be imported by Ray's workers; Ray, if a test has started it, ends with the module."""
    before = os.environ["PYTHONPATH"]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), before])
    yield
    os.environ["PYTHONPATH"] = before
    import ray

    if ray.is_initialized():
        family = psutil.Process().children(recursive=True)
        started = [child for child in family if child.name().startswith(("ray::", "raylet", "gcs_server"))]
        assert started
        ray.shutdown()
        assert psutil.wait_procs(started, timeout=20)[1] == []


def on(executor: str, replicas: int = 2) -> Runtime:
    ray = {"cpus_per_worker": 0.5}
    return Runtime(device="cpu", executor=executor, replicas=replicas, ray=ray)


def node(folder: Path, mishap: str) -> Node:
    toy = Stage("sample", 1, "toy_workers:computed", "completions", lambda r, a: {}, lambda r, a: [])
    return Node(toy, None, folder / "sample", {"mishap": mishap}, {})


def starts(folder: Path, index: int) -> int:
    """How often a shard was begun."""
    return len((folder / "log" / str(index)).read_text().split())


@pytest.mark.parametrize("executor", EXECUTORS)
def test_several_workers_write_what_one_would(tmp_path: Path, executor: str) -> None:
    one = stage.execute(node(tmp_path / "one", "none"), on(LOCAL, 1))
    two = stage.execute(node(tmp_path / "two", "none"), on(executor))
    assert two["counts"] == one["counts"]
    for name in ["dropped.parquet", *(f"part-{index:05d}.parquet" for index in range(NUM_SHARDS))]:
        ours, theirs = (pq.read_table(tmp_path / which / "sample" / name) for which in ("two", "one"))
        assert ours.equals(theirs), name
    assert [starts(tmp_path / "two", index) for index in range(NUM_SHARDS)] == [1] * NUM_SHARDS
    facts = two["facts"]
    assert (facts["executor"], facts["workers"], facts["engine"]) == (executor, 2, "toy")
    assert len(set(facts["number"])) == 2  # or two engines would have one seed
    assert facts["tokens"] == sum(range(NUM_SHARDS))
    assert one["facts"]["number"] == 0


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_killed_worker_costs_its_shards_in_flight(tmp_path: Path, executor: str) -> None:
    found = stage.execute(node(tmp_path, "killed once"), on(executor))
    assert found["counts"]["written"] == {"completion": NUM_SHARDS}
    begun = {index: starts(tmp_path, index) for index in range(NUM_SHARDS)}
    assert begun[UNLUCKY] == 2
    # of its group, Ray has what was finished in order, the pipe has all that was sent
    again = [index for index, times in begun.items() if times == 2]
    group = next(group for group in groups(range(NUM_SHARDS), 2) if UNLUCKY in group)
    assert set(again) <= set(group)
    assert again == ([UNLUCKY] if executor == LOCAL else [index for index in group if index >= UNLUCKY])
    # a Ray worker is known by its first shard, and the killed one had none to show
    assert len(set(found["facts"]["number"])) == (3 if executor == LOCAL else 2)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("mishap", "sentence"),
    [
        ("killed", "sample: 3 .*worker.* were lost "),
        ("never opens", "sample: 3 .*worker.* were lost "),
        ("refuses", "^prompt '5' in en: expected something else$"),
    ],
)
def test_what_cannot_go_on_ends_in_one_sentence(
    tmp_path: Path, executor: str, mishap: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        stage.execute(node(tmp_path, mishap), on(executor))
    assert "\n" not in str(caught.value)
    if mishap == "killed":
        assert starts(tmp_path, UNLUCKY) == 3
    if mishap != "never opens":
        finished = {shard.index for shard in shards.shards(tmp_path / "sample")}
        assert UNLUCKY not in finished


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_mistake_of_ours_is_not_hidden(
    tmp_path: Path, executor: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exception) as caught:
        stage.execute(node(tmp_path, "mistake"), on(executor))
    assert not isinstance(caught.value, UserError)
    assert "a mistake of ours" in f"{caught.value}\n{capfd.readouterr().err}"
    assert starts(tmp_path, UNLUCKY) == 1


def test_no_process_is_left(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        stage.execute(node(tmp_path, "refuses"), on(LOCAL))
    left = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    assert left == []


def test_groups_get_smaller_towards_the_end() -> None:
    assert groups([], 3) == []
    assert groups(list(range(20)), 1) == [list(range(16)), [16, 17, 18, 19]]
    portions = groups(list(range(100, 200)), 3)
    assert [index for portion in portions for index in portion] == list(range(100, 200))
    sizes = [len(portion) for portion in portions]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (16, 1)


def runtime(**values: object) -> Runtime:
    return Runtime.model_validate(values)


def test_gpus_are_shared_out_by_the_names_cuda_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,GPU-a,2,3,4")
    assert gpu_shares(runtime(replicas="auto"), 2) == [["7", "GPU-a"], ["2", "3"]]
    assert gpu_shares(runtime(replicas=3), 1) == [["7"], ["GPU-a"], ["2"]]
    assert gpu_shares(runtime(replicas=3), 0) == [[], [], []]
    assert gpu_shares(runtime(), 4) == [[]]
    with pytest.raises(UserError, match=r"3 with 2 GPUs a worker: found 5 GPUs, expected 6"):
        gpu_shares(runtime(replicas=3), 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_shares(runtime(replicas="auto"), 1) == [[]]
