"""What only Ray has: a running cluster to join, and nodes that may not see what the driver sees."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from croco.errors import UserError
from croco.pipeline.node import Node, Stage, new_record
from croco.pipeline.ray import ShardWorker
from croco.storage.records import write_record
from croco.storage.shards import marker_path
from toy_workers import NUM_SHARDS, ToyWorker

HERE = Path(__file__).parents[1]
SECONDS = 120


def shard_worker(folder: Path, place: Path) -> ShardWorker:
    worker = partial(ToyWorker, folder, "none")
    return ShardWorker(worker, Path("sample"), partial(marker_path, Path("sample")), "sha256:a", str(place))


def test_a_node_without_the_runs_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # and back again afterwards
    (tmp_path / "sample").mkdir()
    with pytest.raises(UserError, match=r"does not find sample/stage\.json .* all nodes share"):
        shard_worker(tmp_path, tmp_path / "elsewhere").check_place()
    with pytest.raises(UserError, match="all nodes share"):
        shard_worker(tmp_path, tmp_path).check_place()
    node = Node(
        Stage("sample", 1, "", "", lambda r, a: {}, lambda r, a: []), None, tmp_path / "sample", {}, {}
    )
    record = new_record(node, 4)
    write_record(tmp_path / "sample", record | {"fingerprint": "sha256:b"})
    with pytest.raises(UserError, match="all nodes share"):
        shard_worker(tmp_path, tmp_path).check_place()
    write_record(tmp_path / "sample", record | {"fingerprint": "sha256:a"})
    shard_worker(tmp_path, tmp_path).check_place()


def test_rows_keep_their_order_and_what_is_finished_is_not_made_again(tmp_path: Path) -> None:
    """The toy worker finishes in reverse; a block's place must not depend on that, nor on what is there already."""
    worker = ShardWorker(
        partial(ToyWorker, tmp_path, "none"), tmp_path, partial(marker_path, tmp_path), "", ""
    )
    worker.name = "w"
    (tmp_path / "part-00003.done").touch()
    rows = [
        row for table in worker.rows(ToyWorker(tmp_path, "none", 0), [2, 3, 4]) for row in table.to_pylist()
    ]
    assert [row["index"] for row in rows] == [2, 3, 4]
    assert [row["table"] is None for row in rows] == [False, True, False]
    assert not (tmp_path / "3").exists()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster on the loopback, which another process has started and which wants a token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--head", "--block", "--num-cpus=2", "--include-dashboard=false", f"--port={port}"]
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", *words],
        env=os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PYTHONPATH": str(HERE)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    family = [psutil.Process(head.pid)]
    try:
        yield f"127.0.0.1:{port}"
        family += psutil.Process(head.pid).children(recursive=True)
    finally:
        head.terminate()
        head.wait(SECONDS)
        assert psutil.wait_procs(family, timeout=SECONDS)[1] == []


DRIVE = """
import sys
from pathlib import Path
from pipeline import test_compute as test_executor
from croco.pipeline import stage
runtime = test_executor.on("ray")
ray = runtime.ray.model_copy(update={"address": sys.argv[1]})
runtime = runtime.model_copy(update={"ray": ray})
node = test_executor.node(Path("run"), "none")
print(stage.execute(node, runtime)["counts"])
"""


@pytest.mark.slow
def test_a_running_cluster_is_joined_by_its_address(tmp_path: Path, cluster: str) -> None:
    """The driver is a process of its own, as a user's is; the nodes import the croco that it sends them."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ["PYTHONPATH"]])}
    command = [sys.executable, "-c", DRIVE, cluster]
    end = time.monotonic() + SECONDS
    while True:  # until the cluster is up
        ran = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS
        )
        if ran.returncode == 0 or time.monotonic() > end:
            break
        assert f"runtime.ray.address = '{cluster}': cannot join a Ray cluster there" in ran.stderr
    written = {"completion": NUM_SHARDS}
    counts = {"read": {"completion": 2 * NUM_SHARDS}, "written": written, "dropped": written}
    assert ran.stdout == f"{counts}\n", ran.stderr
