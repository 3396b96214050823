"""EuroEval's results file, read strictly: one line per dataset, in the format of its version 18.

What another version wrote, a dataset that is there twice, and an average over fewer iterations than were asked for are
errors: they would put numbers side by side that do not belong together. The interval is EuroEval's, 1.96 standard
errors over iterations."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import AliasPath, BaseModel, Field, Json, ValidationError

from croco.config.evaluation import STANDS_FOR, VERSION
from croco.errors import UserError

SEED = 4242  # EuroEval's own, the same for every model: all arms see the same draws of a dataset
GREEDY = 0.0  # so it asks
# where the file has what
INTERVAL = ("score_details", "uncertainty", "confidence_interval")
DETAILS = ("eval_library", "additional_details")


class Metric(BaseModel):
    """A metric of one dataset, with EuroEval's interval where it has one."""

    name: str = Field(validation_alias="evaluation_name")
    dataset: str = Field(validation_alias=AliasPath("source_data", "dataset_name"))
    value: float = Field(validation_alias=AliasPath("score_details", "score"))
    low: float | None = Field(None, validation_alias=AliasPath(*INTERVAL, "lower"))
    high: float | None = Field(None, validation_alias=AliasPath(*INTERVAL, "upper"))
    details: dict[str, Any] = Field({}, validation_alias=AliasPath("score_details", "details"))


class Record(BaseModel):
    """One line of the file: one model on one dataset."""

    model: str = Field(validation_alias=AliasPath("model_info", "name"))
    languages: Json[list[str]] = Field(validation_alias=AliasPath(*DETAILS, "languages"))
    few_shot: str | None = Field(None, validation_alias=AliasPath(*DETAILS, "few_shot"))
    validation_split: str | None = Field(None, validation_alias=AliasPath(*DETAILS, "validation_split"))
    iterations: Json[list[dict[str, Any]]] = Field(validation_alias=AliasPath(*DETAILS, "raw_results"))
    metrics: list[Metric] = Field(min_length=1, validation_alias="evaluation_results")

    @property
    def dataset(self) -> str:
        return self.metrics[0].dataset

    @property
    def failed_instances(self) -> int:
        """Prompts, over all iterations, that the model's answer to could not be had."""
        return round(float(self.metrics[0].details.get("num_failed_instances", 0)))


def read_records(path: Path, model: str, growing: bool = False) -> dict[str, Record]:
    """The records of a results file by dataset, all of one model; raises UserError for a line that does not belong. The
    last line of a `growing` file may have no end yet, or EuroEval was killed at it."""
    records: dict[str, Record] = {}
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1] if growing else content
    lines = whole.decode("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            record = _read(line, f"{path}, line {number}")
            if record.model != model:
                raise UserError(f"{path}, line {number}: results of '{record.model}', expected '{model}'")
            if len({metric.dataset for metric in record.metrics}) > 1:
                raise UserError(f"{path}, line {number}: metrics of several datasets, expected those of one")
            if record.dataset in records:
                raise UserError(f"{path}, line {number}: '{record.dataset}' a second time, expected it once")
            records[record.dataset] = record
    return records


def _read(line: str, place: str) -> Record:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: expected JSON, found {error}") from None
    library = values.get("eval_library") if isinstance(values, dict) else None
    written_by = library.get("version") if isinstance(library, dict) else None
    if written_by is None and isinstance(values, dict):
        written_by = values.get("euroeval_version")  # the format of 16
    if written_by != VERSION:
        raise UserError(f"{place}: written by EuroEval {written_by or '(unknown)'}, expected {VERSION}")
    try:
        return Record.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{place}: no result of EuroEval {VERSION}: {where}: {first['msg']}") from None


def rows_of(record: Record, arm: str, language: str, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A record's rows of the results table, one per metric; raises UserError when it is not what was asked for
    (iterations, split and few_shot). `n` is the number of iterations, the unit of EuroEval's interval."""
    name = record.dataset
    primary = language.split("-")[0]
    if not {primary, STANDS_FOR.get(primary, primary)} & set(record.languages):
        raise UserError(f"EuroEval's '{name}' is in {', '.join(record.languages)}, expected {language}")
    # a task that allows no examples, and a dataset with one split alone, say nothing
    if record.few_shot not in (None, str(asked["few_shot"]).lower()):
        raise UserError(f"'{name}' was asked with few_shot = {record.few_shot}, expected the recipe's")
    if record.validation_split not in (None, str(asked["split"] == "val").lower()):
        raise UserError(f"'{name}' has results of the other split, expected those of '{asked['split']}'")
    if len(record.iterations) != asked["iterations"]:
        raise UserError(f"'{name}' has {len(record.iterations)} iterations, expected {asked['iterations']}")
    names = Counter(metric.name for metric in record.metrics)
    for metric_name, times in names.items():
        if times > 1:
            raise UserError(f"'{name}' has '{metric_name}' {times} times, expected each metric once")
    common = {"arm": arm, "language": language, "benchmark": name, "temperature": GREEDY, "seed": SEED}
    common["n"] = len(record.iterations)
    rows = []
    for metric in record.metrics:
        _check_whole(name, metric.name, record.iterations)
        numbers = {"value": metric.value, "ci_low": metric.low, "ci_high": metric.high}
        if not all(number is not None and math.isfinite(number) for number in numbers.values()):
            raise UserError(f"'{name}': '{metric.name}' is {metric.value} without an interval")
        rows.append(common | {"metric": metric.name} | numbers)
    return rows


def _check_whole(dataset: str, metric: str, iterations: Sequence[Mapping[str, Any]]) -> None:
    """EuroEval leaves out of a mean, without a word, every iteration whose value is no number."""
    short = metric.removeprefix("test_")
    values = [iteration.get(short, iteration.get(metric)) for iteration in iterations]
    good = [value for value in values if isinstance(value, float) and math.isfinite(value)]
    if len(good) != len(values):
        raise UserError(
            f"'{dataset}': '{metric}' is a mean over {len(good)} of {len(values)} iterations, expected all"
        )


def in_all_arms(results: pl.DataFrame, num_arms: int) -> tuple[pl.DataFrame, list[str]]:
    """The rows of those datasets that every arm has, in the same metrics, and the names of the other datasets."""
    key = ["language", "benchmark"]
    metrics = results.group_by("arm", *key).agg(pl.col("metric").sort(), pl.col("n").min())
    whole = (
        metrics.group_by(key)
        .agg(pl.len().alias("arms"), pl.struct("metric", "n").n_unique().alias("kinds"))
        .filter((pl.col("arms") == num_arms) & (pl.col("kinds") == 1))
    )
    left_out = results.join(whole, on=key, how="anti")["benchmark"].unique().sort().to_list()
    return results.join(whole, on=key, how="semi"), left_out
