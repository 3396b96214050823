"""`croco score --diagnose`: how well reward models rank the pairs of a preference set, language by language.

Any file of pairs: M-RewardBench's columns (prompt, chosen, rejected, language, subset), ours, or TRL's. The models are
compared on the pairs that all of them could score; the others are in the ledger. The measures are in `metrics.py`."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from croco import languages
from croco.config.load import NO_PROMPTS, apply_override, from_dict
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.models import open
from croco.pipeline.progress import progress
from croco.stages.diagnose.metrics import Row, agreement, markdown, rank
from croco.stages.prompts.columns import FileRow
from croco.stages.prompts.values import Unusable
from croco.stages.score.reward import open_reward
from croco.stages.score.score import check_finite
from croco.storage import files, provenance, shards
from croco.storage.rows import file_rows, files_of
from croco.storage.schemas import DROPPED, Drop, ledger

FILES = ("pairs.parquet", "ranking.parquet", "dropped.parquet", "ranking.md", "diagnosis.json")
IDS, CATEGORIES = ("prompt_id", "id"), ("category", "subset", "domain")
CHUNK = 256  # pairs scored at once
RANKING = pa.schema([
    pa.field("reward", pa.string(), nullable=False),
    pa.field("language", pa.string(), nullable=False),  # a code, or "all"
    pa.field("category", pa.string()),  # null: all of them
    pa.field("metric", pa.string(), nullable=False),
    pa.field("value", pa.float64(), nullable=False),
    pa.field("ci_low", pa.float64()),  # of means, over prompts; null for the others
    pa.field("ci_high", pa.float64()),
    pa.field("n", pa.int64(), nullable=False),  # pairs
])  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One pair of a preference set."""

    prompt_id: str
    language: str
    category: str | None
    messages: list[dict[str, str]]
    chosen: str
    rejected: str


def diagnose(
    sources: Sequence[Path],
    rewards: Sequence[str],
    to: Path,
    language: str | None = None,
    overrides: Sequence[str] = (),
) -> pl.DataFrame:
    """Score every pair with every model and write tables, ledger and a page of Markdown under `to`; returns the
    ranking.

    `language` is that of all rows, where no column says it; `overrides` are of the recipe's [reward] and [runtime].
    Raises UserError naming file and row for what is missing."""
    if not rewards or len(set(rewards)) != len(rewards):
        raise UserError("--diagnose: expected --reward MODEL, once or for several models")
    files.check_own_folder(
        to, "diagnosis.json", ["sources", "rewards"], re.compile("|".join(map(re.escape, FILES)))
    )
    with files.writing(to):
        to.mkdir(parents=True, exist_ok=True)
    pairs, drops = read_pairs(sources, language)
    num_read = len(pairs) + len(drops)
    columns: dict[str, NDArray[np.float64]] = {}
    for number, model in enumerate(rewards):
        scores, reasons = score_pairs(
            pairs, recipe_of(model, sorted({pair.language for pair in pairs}), overrides)
        )
        columns[f"chosen_{number}"], columns[f"rejected_{number}"] = scores[:, 0], scores[:, 1]
        drops += [("pair", pairs[i].prompt_id, pairs[i].language, None, why) for i, why in reasons.items()]
    table = tabulate(pairs, columns)
    if table.is_empty():
        raise UserError(f"no pair could be scored by all models: {drops[0][4]}")
    rows = [row for number, model in enumerate(rewards) for row in rank(table, number, model)]
    rows += [row for number in range(len(rewards) - 1) for row in agreement(table, number, rewards)]
    ranking = pl.DataFrame(rows, schema=pl.from_arrow(RANKING.empty_table()).schema, orient="row")  # type: ignore[union-attr]
    named = {
        f"{side}_{i}": f"{side}_score: {model}"
        for i, model in enumerate(rewards)
        for side in ("chosen", "rejected")
    }
    scored = table.rename(named).to_arrow()
    shards.write_parquet(to / "pairs.parquet", scored, scored.schema)
    shards.write_parquet(to / "ranking.parquet", ranking.to_arrow(), RANKING)
    shards.write_parquet(to / "dropped.parquet", ledger(drops), DROPPED.schema)
    reasons_of_all = Counter(drop[4] for drop in drops)
    files.write_text(to / "ranking.md", markdown(ranking, rewards, num_read - table.height, reasons_of_all))
    record = {"sources": [str(source) for source in sources], "rewards": list(rewards), "pairs": table.height}
    files.write_json(to / "diagnosis.json", record | {"dropped": len(drops)} | provenance.here())
    return ranking


def recipe_of(model: str, codes: Sequence[str], overrides: Sequence[str]) -> Recipe:
    """A recipe that holds the reward, a model or a function ("module:name"), and how to run it."""
    is_function = ":" in model and not model.startswith("lab:")
    values = {
        "run": {"name": "diagnose", "languages": list(codes)},
        **NO_PROMPTS,
        "reward": {"function" if is_function else "model": model},
        "arms": {"none": {}},
    }
    for override in overrides:
        if not override.startswith(("reward.", "runtime.")) or override.startswith("reward.model"):
            raise UserError(f"--set {override}: with --diagnose expected a value of [reward] or [runtime]")
        apply_override(values, override)
    return from_dict(values, "croco score --diagnose")


# Reading ---------------------------------------------------------------------------------------------------------


def read_pairs(sources: Sequence[Path], language: str | None) -> tuple[list[Pair], list[Drop]]:
    """The pairs of files and of folders with finished shards, and those left out with the reason."""
    if language is not None:
        languages.check(language)
    pairs: list[Pair] = []
    drops: list[Drop] = []
    for path in (path for source in sources for path in files_of(source)):
        for where, row in file_rows(path):
            pair, obstacle = _pair(where, row, language)
            if obstacle:
                drops.append(("pair", pair.prompt_id, pair.language, None, obstacle))
            else:
                pairs.append(pair)
    if not pairs:
        raise UserError(f"{', '.join(map(str, sources))}: no pairs, expected rows with chosen and rejected")
    return pairs, drops


def _pair(where: str, values: Any, language: str | None) -> tuple[Pair, str]:
    row = FileRow(where, values)
    for column in ("chosen", "rejected"):
        if column not in row.values:
            there = ", ".join(map(str, row.values)) or "none"
            raise UserError(f"{where}: no column '{column}' (found: {there}), expected a preference pair")
    spoken = row.values.get("language") or language
    if not isinstance(spoken, str):
        raise UserError(f"{where}: no language, expected a column 'language' or --language")
    try:
        code = languages.normal(spoken)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    prompt_id = next((str(row.values[name]) for name in IDS if row.values.get(name) is not None), where)
    category = next((str(row.values[name]) for name in CATEGORIES if row.values.get(name) is not None), None)
    empty = Pair(prompt_id, code, category, [], "", "")
    if row.values["rejected"] is None or row.values["chosen"] is None:
        return empty, "a side of the pair is missing"
    try:
        messages, sides = row.sides()
    except Unusable as reason:
        return empty, str(reason)
    return Pair(prompt_id, code, category, messages, sides["chosen"], sides["rejected"]), ""


# Scoring ---------------------------------------------------------------------------------------------------------


def score_pairs(pairs: Sequence[Pair], recipe: Recipe) -> tuple[NDArray[np.float64], dict[int, str]]:
    """Scores of (chosen, rejected), shape (pairs, 2), nan where there is none, and the reasons by pair."""
    name = recipe.reward.name
    scores, reasons = np.full((len(pairs), 2), math.nan), {}
    score, _ = open_reward(recipe.reward, recipe.runtime)
    try:
        with progress(name, len(pairs), "pair") as bar:
            for start in range(0, len(pairs), CHUNK):
                part = pairs[start : start + CHUNK]
                groups = [(pair.messages, _completions(pair)) for pair in part]
                for i, values in enumerate(score(groups), start):
                    for side, value in enumerate(values):
                        if isinstance(value, str):
                            reasons[i] = f"{name}: {value}"
                        else:
                            check_finite(value, (pairs[i].prompt_id, pairs[i].language, side), name)
                            scores[i, side] = value
                bar.advance(len(part))
    finally:
        del score
        open.release()
    return scores, reasons


def _completions(pair: Pair) -> list[Row]:
    key = {"prompt_id": pair.prompt_id, "language": pair.language}
    return [key | {"completion": text} for text in (pair.chosen, pair.rejected)]


def tabulate(pairs: Sequence[Pair], columns: Mapping[str, NDArray[np.float64]]) -> pl.DataFrame:
    """The pairs that every model scored both sides of, without their texts."""
    table = pl.DataFrame(
        {
            "prompt_id": [pair.prompt_id for pair in pairs],
            "language": [pair.language for pair in pairs],
            "category": pl.Series([pair.category for pair in pairs], dtype=pl.String),
            "chosen_length": [len(pair.chosen) for pair in pairs],
            "rejected_length": [len(pair.rejected) for pair in pairs],
            **columns,
        }
    )
    return table.filter(pl.all_horizontal(pl.col(*columns).is_not_nan()))
