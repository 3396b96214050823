"""A run that an earlier version finished (commit 09393d8, from a small lab recipe) is still complete."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from croco.cli.main import app
from croco.pipeline import run, stage
from croco.pipeline.node import Node
from croco.pipeline.status import Status, status_of
from croco.storage import records
from croco.storage.hashing import digest

RUN = Path(__file__).parent / "data" / "old-house.tar.xz"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's resolved recipe, and its folder beside it."""
    with tarfile.open(RUN) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "old-house").rename(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run" / "recipe.json"


def croco(*words: str) -> str:
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    return found.output


def test_every_stage_is_complete_and_looked_at_once(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []

    def counted(node: Node, contents: bool = False) -> Status:
        looked_at.append(node.title)
        return status_of(node, contents)

    for module in (run, stage):
        monkeypatch.setattr(module, "status_of", counted)
    lines = [line for line in croco("run", str(recipe)).splitlines() if "complete, skipped" in line]
    assert [line.split()[0] for line in lines] == looked_at
    assert len(lines) == 16


def test_a_held_out_language_more_makes_its_pairs_stale(recipe: Path) -> None:
    """What the old record does not say is taken from the recipe; once remade, it is recorded."""
    more = ["--set", 'run.held_out_languages=["sv", "de"]']
    assert "pair/mono                    complete" in croco("plan", str(recipe), *more)
    record = records.read_record(Path("run/pair/mono"))
    record["science"]["settings"]["evaluated"] = ["da", "en", "sv"]
    record["fingerprint"] = digest(record["science"])
    records.write_record(Path("run/pair/mono"), record)
    assert "pair/mono                    stale" in croco("plan", str(recipe), *more)


def test_a_default_that_is_another_now_is_what_changed(recipe: Path) -> None:
    """The recipe as a person wrote it, without that value."""
    found = CliRunner().invoke(app, ["run", str(recipe.with_name("recipe.toml"))])
    assert found.exit_code == 2
    lines = found.output.splitlines()
    assert lines[0].endswith("pair/mono in run/pair/mono was made with other settings:")
    assert lines[1:2] == ["  guards.wrong_language: flag → drop"]
    assert lines[2].startswith("  and with it pair/multi, train/mono")
