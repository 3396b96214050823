"""What the page needs of a run's folder, read once: recipe, stages, results, scores, curves, the account of every
stage. Texts are `browser.py`'s. Nothing is drawn or worded here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from croco.config.load import load
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.pipeline.arms import scores_of as scores_read_by
from croco.pipeline.graph import STAGES
from croco.stages.evaluate.results import BASE
from croco.storage import files, records, shards


@dataclass(frozen=True)
class Flow:
    """What a stage did with one kind of row: read = written + dropped."""

    unit: str
    read: int
    written: int
    reasons: list[tuple[str, int]]  # why the rest was left out, the most frequent first


@dataclass(frozen=True)
class Step:
    """One stage of the account from prompts to pairs."""

    stage: str
    arm: str
    flows: list[Flow]
    made: int | None  # the pairs that came of it
    flags: list[tuple[str, int]]  # what was marked and kept


@dataclass(frozen=True)
class Run:
    """A finished run as the page sees it."""

    folder: Path
    recipe: Recipe
    stages: dict[str, dict[str, Any]]  # "sample" or "pair/ARM" -> its stage.json
    results: pl.DataFrame
    metrics: dict[str, list[dict[str, Any]]]  # arm -> lines of its training curve
    steps: list[Step]


def read_recipe(folder: Path) -> Recipe:
    """The resolved recipe of a run; raises UserError when the folder is none."""
    if not (folder / "recipe.json").is_file():
        raise UserError(f"{folder} is no run: found no recipe.json")
    if not isinstance(files.read_json(folder / "recipe.json"), dict):
        raise UserError(f"{folder / 'recipe.json'}: expected a table of settings")
    return load(folder / "recipe.json")


def require(folder: Path, titles: Sequence[str]) -> None:
    """Raise UserError naming the stages (with arms) of a run that are not complete."""
    missing = [title for title in titles if records.state(folder / title) != "complete"]
    if missing:
        stages = "stage" if len(missing) == 1 else "stages"
        raise UserError(f"{folder} has no complete {stages} {', '.join(missing)}: run `croco run` first")


def read_results(folder: Path) -> Run:
    """A run's recipe, stages and results; raises UserError when the results are not there or lack an arm."""
    recipe = read_recipe(folder)
    require(folder, ["results"])
    results = shards.read_table(folder / "results")
    facts = records.read_record(folder / "results")["facts"]
    # an arm of which no completion was judged has no row, and the page says so
    present = {*results["arm"].to_list(), *(arm for arm, _ in facts.get("without_verdict", ()))}
    if absent := [arm for arm in (BASE, *recipe.evaluated_arms) if arm not in present]:
        arms = "arm" if len(absent) == 1 else "arms"
        raise UserError(f"the results of {folder} lack the {arms} {', '.join(absent)}: run `croco run` again")
    return Run(folder, recipe, read_stages(folder, recipe), results, {}, [])


def read_stages(folder: Path, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The records of all stages but the report, by title.

    By the recipe, not by what lies there: an arm that was taken out, or scored otherwise before, left its folders."""
    titles = [
        stage.name if arm is None else f"{stage.name}/{arm}"
        for stage in STAGES
        if stage.name != "report"
        for arm in stage.arms(recipe)
    ]
    return {
        title: dict(records.read_record(folder / title))
        for title in titles
        if records.state(folder / title) != "missing"
    }


def read_run(folder: Path) -> Run:
    """Read a run's folder; raises UserError when a stage that the page shows is not complete."""
    recipe = read_recipe(folder)
    trained = [f"{stage}/{arm}" for arm in recipe.arms for stage in ("pair", "train")]
    require(folder, ["prompts", "results", *trained])
    run = read_results(folder)
    metrics = {arm: _lines(folder / "train" / arm / "metrics.jsonl") for arm in recipe.arms}
    return replace(run, metrics=metrics, steps=steps_of(folder, recipe, run.stages))


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {files.reason(error)}") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                made = json.loads(line)
            except (ValueError, RecursionError):
                made = None
            if not isinstance(made, dict):
                raise UserError(
                    f"{path}, line {number}: expected the metrics of a step as JSON, found {line[:60]!r}"
                )
            lines.append(made)
    return lines


def steps_of(folder: Path, recipe: Recipe, stages: Mapping[str, Mapping[str, Any]]) -> list[Step]:
    """The account of every stage from prompts to training, as far as it is recorded."""
    titles = ["prompts", "translate", "sample", "score"]
    titles += [f"{stage}/{arm}" for arm in recipe.arms for stage in ("sample", "score", "pair", "train")]
    return [
        _step(folder / title, *title.partition("/")[::2], stages[title])
        for title in titles
        if title in stages
    ]


def _step(folder: Path, stage: str, arm: str, made: Mapping[str, Any]) -> Step:
    read, written, ledger = _account(folder, made)
    reasons: dict[str, list[tuple[str, int]]] = {}
    for unit, reason, count in shards.reasons(ledger):
        reasons.setdefault(unit, []).append((reason, count))
    flows = [Flow(unit, int(n), int(written.get(unit, 0)), reasons.get(unit, [])) for unit, n in read.items()]
    pairs = int(written.get("pair", 0)) if stage == "pair" else None
    return Step(stage, arm, flows, pairs, reasons.get("flag", []))


def _account(folder: Path, made: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int], pl.DataFrame]:
    """What a stage read and wrote by unit, and its ledger; of one that is not complete, that of its finished shards."""
    nothing = pl.DataFrame(schema={"unit": pl.String, "reason": pl.String})
    if made["state"] == "complete":
        there = (folder / "dropped.parquet").is_file()
        counts = made["counts"]
        return (
            counts.get("read", {}),
            counts.get("written", {}),
            shards.read_dropped(folder) if there else nothing,
        )
    finished = shards.shards(folder)
    read, written = Counter[str](), Counter[str]()
    for shard in finished:
        read.update(shard.read)
        written.update(shard.written)
    ledgers = [
        shards.read_parquet(shard.ledger).select("unit", "reason") for shard in finished if shard.dropped
    ]
    return read, written, pl.concat([nothing, *ledgers])


def scores_of(run: Run, arm: str) -> pl.DataFrame:
    """Language and score of every completion that the arm chose from."""
    name, its_arm = scores_read_by(run.recipe, arm)
    return shards.read_table(run.folder / name / (its_arm or ""), ["language", "score"])
