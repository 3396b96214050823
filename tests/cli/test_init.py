"""`croco init` writes a recipe that loads, and overwrites nothing; the wheel has the recipes inside."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from croco.cli.init import KINDS
from croco.cli.main import app
from croco.config.load import load


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_loads_where_it_is_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["init", kind])
    assert shown.exit_code == 0, shown.output
    name = KINDS[kind][0]
    assert f"croco run {name}" in shown.output
    assert load(name).policy.chat_template is None  # which would be another file
    (tmp_path / name).write_text("mine")
    again = CliRunner().invoke(app, ["init", kind])
    assert again.exit_code == 2
    assert "is there already" in again.output
    assert (tmp_path / name).read_text() == "mine"


def test_an_unknown_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["init", "two-gpus"])
    assert shown.exit_code == 2
    assert "expected one of lab, one-gpu" in shown.output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_wheel_has_the_recipes_inside(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "src", "recipes"):  # away from a build in the tree
        if (root / name).is_dir():
            shutil.copytree(
                root / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info")
            )
        else:
            shutil.copy(root / name, source / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        "wheel",
    ]
    subprocess.run([*build, str(source)], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").glob("croco_tuning-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name, _ in KINDS.values():
        assert f"croco/config/recipes/{name}" in names
