"""Recipes, rows, tables, models and stage folders with anything in them that a disk, a person or another tool may
write: never a traceback, never taken for whole.

2,000 cases together, the same ones every time; CROCO_FUZZ_SEED=7 takes others, CROCO_FUZZ_TIMES=5 five times as many.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import croco
from conftest import TinyModels
from croco.cli import plan
from croco.config.evaluation import Source
from croco.config.load import from_dict, load
from croco.config.runtime import Runtime
from croco.errors import UserError
from croco.pipeline import stage, status
from croco.pipeline.graph import nodes
from croco.pipeline.node import Node
from croco.report.command import progress
from croco.report.exports import results_terminal
from croco.report.load_run import read_results, read_run
from croco.stages.pair.import_files import import_pairs, import_scored
from croco.stages.prompts.load import load as load_prompts
from croco.storage import records, shards
from croco.storage.files import file_digests
from fuzz import JSON, ODD, fuzzed, lines, mutate, spoilt

pytestmark = pytest.mark.slow
RUN = Path(__file__).parent / "pipeline" / "data" / "old-house.tar.xz"
RECIPES = sorted(Path(croco.__file__).parent.glob("config/recipes/*.toml"))
TITLES = ("sample", "pair/mono", "train/mono")
VALUES = st.sampled_from(ODD) | JSON


@contextmanager
def a_sentence() -> Iterator[None]:
    """What may come out of anything that is read: a result, or one sentence."""
    said = "a result"
    try:
        with redirect_stderr(StringIO()):
            yield
    except UserError as error:
        said = str(error)
    assert 0 < len(said.strip()) < 5000


# Recipes --------------------------------------------------------------------------------------------------------------


@fuzzed(600)
@given(data=st.data())
def test_a_recipe_is_refused_in_a_sentence_or_is_what_it_says(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.getbasetemp())
    text = data.draw(st.sampled_from(RECIPES)).read_text()
    with a_sentence():
        if data.draw(st.integers(0, 3)) == 0:
            path = Path("fuzzed.toml")
            path.write_bytes(spoilt(data, text.encode()))
            recipe = load(path)
        else:
            values = tomllib.loads(text)
            for _ in range(data.draw(st.integers(1, 3))):
                values = mutate(data, values, VALUES)
            recipe = from_dict(values if isinstance(values, dict) else {"run": values})
        assert from_dict(json.loads(recipe.model_dump_json())) == recipe
        for node in nodes(recipe):
            assert node.fingerprint
        assert list(plan.describe(recipe))


# Rows -----------------------------------------------------------------------------------------------------------------

PROMPT = [{"role": "system", "content": "Kort."}, {"role": "user", "content": "Hvad?"}]
SIDE = [{"role": "assistant", "content": "Ja."}]
OTHER = [{"role": "assistant", "content": "Nej."}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "prompts": [
        {"prompt_id": f"p{n}", "language": code, "messages": PROMPT, "reference": "Ja.", "domain": None}
        for n in range(3)
        for code in ("en", "da")
    ],
    "pairs": [
        {"prompt_id": "a", "language": "en", "prompt": PROMPT, "chosen": SIDE, "rejected": OTHER},
        {"prompt_id": "b", "language": "da", "prompt": PROMPT, "chosen": SIDE, "rejected": OTHER,
         "score_chosen": 2.0, "score_rejected": 1, "chosen_finish_reason": "stop", "chosen_ids": [7, 8]},
    ],
    "scored": [
        {"prompt_id": f"p{n}", "language": "da", "prompt": "Hvad?", "completion": f"Svar {k}.", "score": k - n,
         "finish_reason": "stop", "sample_id": k}
        for n in range(2) for k in range(3)
    ],
}  # fmt: skip


def read_prompts(path: Path, rows: int, folder: Path) -> None:
    found = load_prompts(Source(source=str(path)), "prompts", ["en", "da"], None)
    told = found.prompts.num_rows + found.dropped.num_rows + sum(found.not_asked_for.values())
    assert told == rows
    assert found.prompts.validate(full=True) is None


def read_pairs(path: Path, rows: int, folder: Path) -> None:
    found, dropped = import_pairs([path])
    assert found.height + len(dropped) == rows
    assert found.filter(pl.col("chosen").is_null() | pl.col("rejected").is_null()).is_empty()


def read_scored(path: Path, rows: int, folder: Path) -> None:
    counts = import_scored([path], folder)
    scores = shards.read_table(folder / "score")
    assert sum(counts.values()) == scores.height
    assert scores.height + shards.read_dropped(folder / "sample").height >= rows
    croco.pairs(scores.join(shards.read_table(folder / "sample"), on=["prompt_id", "language", "sample_id"]))


READERS: dict[str, Callable[[Path, int, Path], None]] = {
    "prompts": read_prompts, "pairs": read_pairs, "scored": read_scored,
}  # fmt: skip


@fuzzed(500)
@given(data=st.data())
def test_json_lines_are_refused_in_a_sentence_or_every_row_is_accounted_for(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows", numbered=True)
    kind = data.draw(st.sampled_from(sorted(ROWS)))
    rows = list(ROWS[kind])
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(rows) - 1))
        rows[place] = mutate(data, rows[place], VALUES)
    content = lines(rows)
    if data.draw(st.integers(0, 2)) == 0:
        content = spoilt(data, content)
    (folder / "x.jsonl").write_bytes(content)
    with a_sentence():
        READERS[kind](
            folder / "x.jsonl", len([line for line in content.split(b"\n") if line.strip()]), folder
        )
    shutil.rmtree(folder)


TYPES = [pa.string(), pa.large_string(), pa.binary(), pa.int8(), pa.int64(), pa.float16(), pa.float64(), pa.bool_(),
         pa.null(), pa.date32(), pa.timestamp("us"), pa.decimal128(38, 2), pa.list_(pa.string()), pa.list_(pa.int64()),
         pa.dictionary(pa.int32(), pa.string()), pa.struct([("role", pa.string())])]  # fmt: skip


@fuzzed(300)
@given(data=st.data())
def test_parquet_is_refused_in_a_sentence_or_every_row_is_accounted_for(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("pages", numbered=True)
    kind = data.draw(st.sampled_from(sorted(ROWS)))
    table = pa.Table.from_pylist(ROWS[kind])
    for _ in range(data.draw(st.integers(0, 2))):
        place = data.draw(st.integers(0, table.num_columns - 1))
        name, wanted = table.column_names[place], data.draw(st.sampled_from(TYPES))
        try:
            column = table.column(name).cast(wanted)
        except (pa.ArrowException, ValueError):
            column = pa.nulls(table.num_rows, wanted)
        table = table.set_column(place, data.draw(st.sampled_from([name, name.upper(), ""])), column)
    path = folder / "x.parquet"
    try:
        pq.write_table(
            table, path, compression=data.draw(st.sampled_from(["snappy", "zstd", "gzip", "none"]))
        )
    except (pa.ArrowException, ValueError):
        return
    rows = table.num_rows
    if data.draw(st.booleans()):
        path.write_bytes(spoilt(data, path.read_bytes()))
        with a_sentence():
            rows = shards.num_rows(path)
    with a_sentence():
        READERS[kind](path, rows, folder)
    with a_sentence():
        croco.pairs(table)
    shutil.rmtree(folder)


# Models ---------------------------------------------------------------------------------------------------------------


@fuzzed(100)
@given(data=st.data())
def test_a_model_is_refused_in_a_sentence_or_gives_finite_numbers(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, tiny_models: TinyModels
) -> None:

    from croco.models.loading import load_policy
    from croco.models.model_files import context_of

    folder = tmp_path_factory.mktemp("model", numbered=True) / "m"
    shutil.copytree(tiny_models.policy, folder)
    path = data.draw(st.sampled_from(sorted(one for one in folder.iterdir() if one.is_file())))
    if path.suffix == ".json" and data.draw(st.integers(0, 3)):
        try:
            path.write_text(json.dumps(mutate(data, json.loads(path.read_text()), VALUES)))
        except ValueError:
            path.write_text("[")
    else:
        path.write_bytes(spoilt(data, path.read_bytes()))
    with a_sentence():
        model, _ = load_policy(str(folder), device="cpu")
        assert context_of(model.config) > 0
    shutil.rmtree(folder.parent)


# Stage folders --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose records have digests, as they are written today."""
    folder = tmp_path_factory.mktemp("whole")
    with tarfile.open(RUN) as archive:
        archive.extractall(folder, filter="data")
    run = folder / "old-house"
    for title in TITLES:
        record = records.read_record(run / title)
        names = record.get("files", ["dropped.parquet"])
        record["digests"] = file_digests(run / title, names)
        records.write_record(run / title, record)
        for marker in (run / title).glob("*.done"):
            counts = json.loads(marker.read_text())
            made = [path.name for path in (run / title).glob(f"{marker.stem}.*parquet")]
            marker.write_text(json.dumps({**counts, "digests": file_digests(run / title, made)}))
    return run


@pytest.fixture(scope="module")
def made(whole: Path) -> list[Node]:
    return nodes(load(whole / "recipe.json", [f'run.folder="{whole}"']))


def spoil(data: st.DataObject, path: Path) -> None:
    kinds = ["bytes", "bytes", "empty", "gone", "folder", "noise"] + ["json"] * 4 * (
        path.suffix != ".parquet"
    )
    kind, content = data.draw(st.sampled_from(kinds)), path.read_bytes()
    if kind == "bytes":
        path.write_bytes(spoilt(data, content))
    elif kind in ("empty", "noise"):
        path.write_bytes(data.draw(st.binary(max_size=40)) if kind == "noise" else b"")
    elif kind in ("gone", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    else:
        try:
            path.write_text(json.dumps(mutate(data, json.loads(content))))
        except ValueError:
            path.write_text("[")


def read(node: Node) -> Any:
    """What later stages and the report read of a stage."""
    if node.stage.table:
        return shards.read_table(node.folder).to_dicts(), shards.read_dropped(node.folder).to_dicts()
    files = (node.folder / "adapter").iterdir()  # the card is a note for people, which anyone may edit
    return {path.name: path.read_bytes() for path in files if path.name != "README.md"}


@fuzzed(400)
@given(data=st.data())
def test_a_spoilt_folder_is_refused_in_a_sentence_or_is_what_it_was(
    data: st.DataObject, whole: Path, made: list[Node], tmp_path_factory: pytest.TempPathFactory
) -> None:
    title = data.draw(st.sampled_from(TITLES))
    run = tmp_path_factory.mktemp("run", numbered=True)
    shutil.copytree(whole / title, run / title)
    (node,) = [node for node in made if node.title == title]
    node = replace(node, folder=run / title)
    before = read(node)
    names = sorted(path.relative_to(run).as_posix() for path in node.folder.rglob("*") if path.is_file())
    for _ in range(data.draw(st.integers(1, 2))):
        spoil(data, run / data.draw(st.sampled_from([name for name in names if (run / name).is_file()])))
    try:
        now = status.status_of(node, contents=True)
        if now.kind == "complete":
            status.mend_ledger(node)
            assert read(node) == before
        elif now.kind == "unfinished":
            stage._start(node, Runtime(), resume=True)
        elif now.kind in status.WRONG:
            assert now.changes
            status.clear(node)
            assert status.status_of(node).kind == "missing"
    except UserError:
        pass  # one sentence
    finally:
        shutil.rmtree(run)


@fuzzed(100)
@given(data=st.data())
def test_a_spoilt_run_has_its_tables_or_a_sentence(
    data: st.DataObject, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("run", numbered=True) / "run"
    shutil.copytree(whole, run)
    files = sorted(path for path in run.rglob("*") if path.is_file() and "report" not in path.parts)
    spoil(data, data.draw(st.sampled_from(files)))
    with a_sentence():
        assert list(results_terminal(run))
    with a_sentence():
        assert read_results(run).results.write_csv()
    with a_sentence():
        assert read_run(run)
    with a_sentence():
        recipe = load(run / "recipe.json", [f'run.folder="{run}"'])
        assert progress(run, recipe).rows
        assert list(plan.describe(recipe))
    shutil.rmtree(run)
