"""A disk that is full: one sentence that names the file, nothing half-written, and the same command goes on."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from conftest import TinyModels, write_recipe
from croco.cli.main import app

HERE = Path(__file__).parents[1]


def croco(command: str, recipe: Path) -> tuple[int, str]:
    found = CliRunner().invoke(app, [command, str(recipe)])
    assert isinstance(found.exception, SystemExit | None), found.exception
    return found.exit_code, found.output


def same_tables(ours: Path, theirs: Path) -> None:
    for stage in ("sample", "score"):
        names = sorted(path.name for path in (theirs / stage).glob("part-*.parquet"))
        assert names == sorted(path.name for path in (ours / stage).glob("part-*.parquet"))
        assert len(names) == 5
        for name in names:
            assert pq.read_table(ours / stage / name).equals(pq.read_table(theirs / stage / name)), (
                stage,
                name,
            )


@contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def calm(tmp_path: Path, tiny_models: TinyModels) -> Path:
    """The folder of a run whose disk was never full."""
    recipe = write_recipe(tmp_path, tiny_models, "calm.toml", "calm")
    assert [croco(command, recipe)[0] for command in ("prompts", "sample", "score")] == [0, 0, 0]
    return tmp_path / "calm"


def test_a_file_that_may_not_grow_stops_the_stage_and_loses_nothing(
    tmp_path: Path, tiny_models: TinyModels, calm: Path
) -> None:
    recipe, run = write_recipe(tmp_path, tiny_models), tmp_path / "run"
    assert croco("prompts", recipe)[0] == 0
    sizes = [path.stat().st_size for path in (calm / "sample").glob("part-*.parquet")]
    with files_no_larger_than(max(sizes) - 1):
        code, said = croco("sample", recipe)
    assert code == 2
    (line,) = [line for line in said.splitlines() if line.startswith("croco: ")]
    assert f"{run / 'sample'}/part-" in line
    assert "(file too large); make room and run the same command again" in line
    assert list(run.rglob(".tmp-*")) == []
    code, said = croco("sample", recipe)
    assert code == 0
    assert "unfinished, going on" in said
    assert croco("score", recipe)[0] == 0
    same_tables(run, calm)


def may_mount() -> bool:
    words = ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(words, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="needs a namespace of its own to mount a small file system in")
def test_a_full_file_system_stops_the_stage_and_loses_nothing(
    tmp_path: Path, tiny_models: TinyModels, calm: Path
) -> None:
    recipe, run = write_recipe(tmp_path, tiny_models), tmp_path / "run"
    run.mkdir()
    words = ["unshare", "-Urm", sys.executable, str(HERE / "full_disk.py"), str(recipe), str(run)]
    found = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=HERE)
    assert found.returncode == 0, found.stdout + found.stderr
    lines = [line.split(" | ") for line in found.stdout.splitlines()]
    assert [line[:3] for line in lines if len(line) > 1] == [
        ["prompts", "0", "None"],
        ["sample", "2", "SystemExit(2)"],
        ["sample", "0", "None"],
        ["score", "2", "SystemExit(2)"],
        ["score", "0", "None"],
    ]
    for line in lines:
        if line[1:2] == ["2"]:
            (sentence,) = line[3:]  # and no temporary file
            assert f"{run / line[0]}/" in sentence
            assert "no space left on device" in sentence
    kept = [int(line[0].split()[2]) for line in lines if " kept " in line[0]]
    assert all(0 < count < 5 for count in kept), kept
    same_tables(Path(f"{run}-kept"), calm)
