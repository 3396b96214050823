"""What the page needs of a run's folder, read once: recipe, stages, results, scores, curves, the ledger, a
browser's worth of pairs.

Texts are read only for the pairs that go into the page: a spread of them by digest when all would make the
page too large. Nothing is drawn or worded here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from croco import store
from croco.arms import scores_of as scores_read_by
from croco.errors import UserError
from croco.pairing.gather import gather, locate
from croco.pipeline import STAGES
from croco.recipe import Recipe, load
from croco.sampling.seeds import digest

MAX_PAIRS = 10_000
MAX_PAIR_BYTES = 1_700_000
_CHUNK = 1000


@dataclass(frozen=True)
class Step:
    """One line of the account from prompts to pairs: what was kept, and why the rest was not."""

    stage: str
    arm: str
    kept: list[tuple[int, str]]  # count and unit
    dropped: list[tuple[str, str, int]]  # unit, reason, count


@dataclass(frozen=True)
class Run:
    """A finished run as the page sees it."""

    folder: Path
    recipe: Recipe
    stages: dict[str, dict[str, Any]]  # "sample" or "pair/ARM" -> its stage.json
    results: pl.DataFrame
    metrics: dict[str, list[dict[str, Any]]]  # arm -> lines of its training curve
    steps: list[Step]


def read_run(folder: Path) -> Run:
    """Read a run's folder; raises UserError when a stage that the page shows is not complete."""
    if not (folder / "recipe.json").is_file():
        raise UserError(f"{folder} is no run: found no recipe.json")
    recipe = load(folder / "recipe.json")
    stages = {}
    # by the recipe, not by what lies there: an arm that was taken out, or scored otherwise before, left its folders
    for stage in STAGES:
        for arm in stage.arms(recipe) if stage.name != "report" else ():
            title = stage.name if arm is None else f"{stage.name}/{arm}"
            if (folder / title / "stage.json").is_file():
                stages[title] = store.read_json(folder / title / "stage.json")
    for needed in [
        "prompts",
        "results",
        *(f"{s}/{arm}" for arm in recipe.arms for s in ("pair", "train")),
    ]:
        if stages.get(needed, {}).get("state") != "complete":
            raise UserError(f"{folder} has no complete stage {needed}: run `croco run` first")
    metrics = {arm: _lines(folder / "train" / arm / "metrics.jsonl") for arm in recipe.arms}
    return Run(
        folder, recipe, stages, store.read_table(folder / "results"), metrics, _steps(folder, recipe, stages)
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _steps(folder: Path, recipe: Recipe, stages: Mapping[str, Mapping[str, Any]]) -> list[Step]:
    shared = [name for name in ("prompts", "translate", "sample", "score") if name in stages]
    own = [
        f"{stage}/{arm}"
        for arm in recipe.arms
        for stage in ("sample", "score", "pair", "train")
        if f"{stage}/{arm}" in stages
    ]
    steps = []
    for title in [*shared, *own]:
        stage, _, arm = title.partition("/")
        counts, facts = stages[title]["counts"], stages[title].get("facts", {})
        kept = [(int(count), unit) for unit, count in counts.get("written", {}).items() if unit != "pool"]
        if stage == "pair":
            kept = [
                (facts[f"{unit}s"], unit) for unit in ("candidate", "pool", "pair") if f"{unit}s" in facts
            ]
        dropped = []
        if (folder / title / "dropped.parquet").is_file():
            # a reason's details, after its colon, are for the ledger
            kind = pl.col("reason").str.split(": ").list.first()
            dropped_rows = store.read_dropped(folder / title).with_columns(kind)
            ledger = dropped_rows.group_by("unit", "reason").len().sort("unit", "reason")
            dropped = [(unit, reason, int(count)) for unit, reason, count in ledger.iter_rows()]
        steps.append(Step(stage, arm, kept, dropped))
    return steps


def scores_of(run: Run, arm: str) -> pl.DataFrame:
    """Language and score of every completion that the arm chose from."""
    name, its_arm = scores_read_by(run.recipe, arm)
    return store.read_table(run.folder / name / (its_arm or ""), ["language", "score"])


def pair_scores(run: Run, arm: str) -> pl.DataFrame:
    """The scores of an arm's pairs and the languages they are in."""
    columns = ["chosen_language", "rejected_language", "chosen_score", "rejected_score"]
    return store.read_table(run.folder / "pair" / arm, columns)


def browser_pairs(run: Run, max_bytes: int = MAX_PAIR_BYTES) -> dict[str, Any]:
    """Pairs for the page's browser, compact: prompts once, pairs as lists in the order of `columns`.

    At most `MAX_PAIRS` pairs and about `max_bytes` of JSON; when there are more, a spread by digest of arm
    and key.
    """
    key, details = ("prompt_id", "language", "pair_id"), _DETAILS
    ranked = []
    for arm in run.recipe.arms:
        rows = locate(run.folder / "pair" / arm, key)
        ranked += [(digest("browser", arm, *row[:3]), arm, *row) for row in rows.iter_rows()]
    total, ranked = len(ranked), sorted(ranked)[:MAX_PAIRS]
    prompts: dict[tuple[str, str], int] = {}
    payload: dict[str, Any] = {
        "total": total,
        "columns": ["arm", "prompt", *details],
        "prompts": [],
        "pairs": [],
    }
    used = 0
    for start in range(0, len(ranked), _CHUNK):
        for arm in run.recipe.arms:
            wanted = [row[2:] for row in ranked[start : start + _CHUNK] if row[1] == arm]
            if not wanted or used > max_bytes:
                continue
            names = pl.DataFrame(wanted, schema=[*key, "shard"], orient="row")
            texts = gather(run.folder / "pair" / arm, names.with_columns(pl.col("shard").cast(pl.Int32)), key,
                           ("messages", *details))  # fmt: skip
            for name, row in zip(names.iter_rows(), texts.iter_rows(named=True), strict=True):
                place = prompts.setdefault(name[:2], len(prompts))
                if place == len(payload["prompts"]):
                    turns = [[message["role"], message["content"]] for message in row["messages"]]
                    payload["prompts"].append([*name[:2], turns])
                    used += len(json.dumps(turns))
                values = [
                    round(v, 3) if isinstance(v, float) else v for v in (row[column] for column in details)
                ]
                payload["pairs"].append([arm, place, *values])
                used += len(json.dumps(values))
                if used > max_bytes:
                    break
    order = {arm: place for place, arm in enumerate(run.recipe.arms)}
    payload["pairs"].sort(key=lambda pair: (order[pair[0]], *payload["prompts"][pair[1]][:2]))
    return payload


_DETAILS = (
    "chosen", "rejected", "chosen_score", "rejected_score", "chosen_calibrated", "rejected_calibrated",
    "chosen_language", "rejected_language",
    "chosen_sample_id", "rejected_sample_id", "pool_size", "pool_mean", "pool_std", "flags",
)  # fmt: skip
