"""Commands on run folders whose files are cut, empty, of another shape, or in each other's place: one sentence each.

The folder is a finished run that commit 09393d8 made.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from croco.cli.main import app

RUN = Path(__file__).parent / "data" / "old-house.tar.xz"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with tarfile.open(RUN) as archive:
        archive.extractall(folder, filter="data")
    return folder / "old-house"


def text(name: str, content: str) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        (run / name).write_text(content)

    return spoil


def gone(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def folder(name: str) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()

    return spoil


def file(name: str) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        shutil.rmtree(run / name)
        (run / name).write_text("a file")

    return spoil


def torn(name: str) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        content = (run / name).read_bytes()
        (run / name).write_bytes(b"x" * 20 + content[20:])

    return spoil


def keep(run: Path) -> None:
    """Leaves the run as it is."""


CASES = [
    (text("recipe.json", "null"), "report RUN", "recipe.json"),
    (text("recipe.json", "[1]"), "compare RUN RUN", "recipe.json"),
    (text("recipe.json", '{"run": 3}'), "export RUN --arm mono --to new", "run"),
    (text("results/stage.json", "{}"), "report RUN --terminal", "results/stage.json"),
    (text("results/stage.json", "[]"), "report RUN --markdown new.md", "results/stage.json"),
    (text("results/part-00000.done", "{}"), "report RUN --terminal", "results/part-00000.done"),
    (text("train/mono/stage.json", "{}"), "report RUN", "train/mono/stage.json"),
    (torn("train/mono/metrics.jsonl"), "report RUN", "train/mono/metrics.jsonl"),
    (torn("results/part-00000.parquet"), "report RUN --csv new.csv", "results/part-00000.parquet"),
    (keep, "report RUN --csv .", "expected the name of a file"),
    (keep, "export RUN --arm mono --to RUN/recipe.json", "recipe.json is a file"),
    (keep, "export RUN --arm mono --to RUN", "croco has not made it"),
    (keep, "merge RUN --arm mono --to .", "not empty"),
    (keep, "report RUN --csv RUN", "expected the name of a file"),
    (
        gone("pair/mono/dropped.parquet"),
        "export RUN --arm mono --to new",
        "pair/mono/dropped.parquet is missing",
    ),
    (text("pair/mono/part-00000.parquet", "PAR1"), "export RUN --arm mono --to new", "part-00000.parquet"),
    (
        text("train/mono/adapter/adapter_config.json", "{x"),
        "merge RUN --arm mono --to new",
        "adapter_config.json",
    ),
    (
        text("train/mono/adapter/adapter_config.json", "[1]"),
        "merge RUN --arm mono --to new",
        "adapter_config.json",
    ),
    (text("train/mono/stage.json", "{"), "merge RUN --arm mono --to new", "train/mono/stage.json"),
    (text("sample/stage.json", "null"), "plan RECIPE", "sample/stage.json"),
    (file("sample"), "plan RECIPE", "sample is a file"),
    (file("sample"), "run RECIPE --rebuild", "sample is a file"),
    (folder(".lock"), "run RECIPE", "cannot be made or written"),
    (folder("sample/part-00000.done"), "run RECIPE", "sample/part-00000.done"),
    (text("sample/part-00000.done", '{"rows": -3}'), "run RECIPE", "sample/part-00000.done"),
    (text("sample/stage.json", '"a"'), "score RECIPE", "sample/stage.json"),
    (text("sample/stage.json", "{}"), "run RECIPE", "sample/stage.json"),
    (text("sample/stage.json", "[]"), "run RECIPE", "sample/stage.json"),
    (text("sample/stage.json", "null"), "run RECIPE", "sample/stage.json"),
    (text("sample/part-00000.done", "[]"), "run RECIPE", "sample/part-00000.done"),
    (text("sample/part-00000.done", ""), "run RECIPE", "sample/part-00000.done"),
    (gone("train/mono/metrics.jsonl"), "report RUN RUN", "train/mono/metrics.jsonl cannot be read"),
    (text("recipe.json", '{"run": {}}'), "run RECIPE", "croco has not written it"),
    (keep, "run RECIPE --until prompts --set run.folder='OTHER/x'", "not a directory"),
]


def tables(run: Path) -> list[Path]:
    """What the stages made; their records and the lock may change."""
    return [
        path for path in run.rglob("*") if path.is_file() and path.suffix in (".parquet", ".done", ".html")
    ]


@pytest.mark.parametrize(("spoil", "command", "part"), CASES, ids=[f"{c[1]}: {c[2]}" for c in CASES])
def test_one_sentence_names_the_file(
    tmp_path: Path,
    finished: Path,
    spoil: Callable[[Path], None],
    command: str,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished, run)
    other.write_text("a file")
    recipe = str(shutil.copy(run / "recipe.json", tmp_path / "recipe.json"))
    spoil(run)
    monkeypatch.chdir(tmp_path)
    words = command.replace("RUN", "run").replace("RECIPE", recipe).replace("OTHER", "other").split()
    before = {path: path.read_bytes() for path in tables(run)}
    found = CliRunner().invoke(app, words)
    assert isinstance(found.exception, SystemExit), found.exception
    assert found.exit_code == 2
    (line,) = [line for line in found.output.splitlines() if line.startswith("croco: ")]
    assert part in line
    assert {path: path.read_bytes() for path in tables(run)} == before
