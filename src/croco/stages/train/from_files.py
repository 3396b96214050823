"""`croco train FILE...`: any file of preference pairs in, a tuned policy out, without a recipe.

A file in which a prompt has scored completions instead (UltraFeedback's form) is paired first, as `croco pairs` does
it; with training.method = "sft" a row may hold a prompt and one completion. The folder holds what a stage `train`
writes, a record of how it was made, and a card. Called again after a kill it goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from croco import languages
from croco.config.load import NO_PROMPTS, apply_override, from_dict
from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.pipeline.progress import Progress, progress
from croco.pipeline.stage import LOCK, lock
from croco.stages.pair.from_files import mappings, pairs_of_files
from croco.stages.pair.import_files import Drop, import_pairs
from croco.stages.train.launch import TrainJob, tune
from croco.stages.train.model_card import base_name, model_card, settings_rows
from croco.stages.train.train import TrainResult
from croco.storage import files, provenance, shards
from croco.storage.hashing import digest, file_identity, model_identity
from croco.storage.rows import file_rows, files_of
from croco.storage.schemas import DROPPED, ledger

ARM = "train"
RECORD = "train.json"
SECTIONS = ("training", "policy", "runtime")  # of a recipe, that --set may change; and run.seed


def train_on_files(
    sources: Sequence[Path],
    model: str,
    to: Path,
    columns: Sequence[str],
    language: str | None,
    overrides: Sequence[str],
    license: str,
    say: Callable[[str], None],
) -> None:
    """Tune `model` on the pairs of the files and write the adapter (or the model) into `to`; raises UserError."""
    recipe = _recipe(model, overrides)
    mapped = mappings(columns)
    if language is not None:
        languages.check(language)
    sources = [file for source in sources for file in files_of(source)]
    made_from = {
        "files": {label: file_identity(str(source)) for label, source in labelled(sources).items()},
        "columns": mapped,
        "language": language,
        "model": model_identity(model, recipe.policy.revision, "--model"),
        "policy": recipe.policy.model_dump(mode="json", exclude={"model", "revision", "trust_remote_code"}),
        "training": recipe.arms[ARM].training.model_dump(mode="json"),
        "seed": recipe.run.seed,
    }
    _stands(to, digest(made_from))  # before anything is made there
    with lock(to):
        if _stands(to, digest(made_from)) == "complete":
            _check_made(to)
            shutil.rmtree(to / "scratch", ignore_errors=True)  # a kill may have come while it went
            say(f"{to} is complete, skipped")
            return
        _train(recipe, made_from, sources, columns, to, license, say)


def _train(
    recipe: Recipe,
    made_from: Mapping[str, Any],
    sources: Sequence[Path],
    columns: Sequence[str],
    to: Path,
    license: str,
    say: Callable[[str], None],
) -> None:
    record: dict[str, Any] = {"state": "running", "fingerprint": digest(made_from), "science": made_from}
    files.write_json(to / RECORD, record)
    chosen_only = recipe.arms[ARM].training.method == "sft"
    pairs, unusable = _pairs(sources, made_from["columns"], columns, made_from["language"], chosen_only, to)
    _write_pairs(to / "scratch" / "pairs", pairs)
    result = _tuned(recipe, to)
    dropped = pa.concat_tables([ledger(unusable), result.dropped.to_arrow().cast(DROPPED.schema)])
    shards.write_parquet(to / "dropped.parquet", dropped, DROPPED.schema)
    facts = {
        name: value for name, value in vars(result).items() if name not in ("dropped", "adapter", "metrics")
    }
    files.write_text(to / "README.md", _card(recipe, made_from, result, pairs, dropped.num_rows, license))
    made = sorted(path.relative_to(to).as_posix() for path in result.adapter.rglob("*") if path.is_file())
    digests = files.file_digests(to, [*made, "dropped.parquet"])
    record |= {"state": "complete", "facts": facts, "digests": digests}
    files.write_json(to / RECORD, record | provenance.here())
    shutil.rmtree(to / "scratch")
    left = f", {dropped.num_rows:,} left out ({to / 'dropped.parquet'})" if dropped.num_rows else ""
    say(f"{result.pairs + result.validation_pairs:,} pairs{left}, {result.steps:,} steps: {result.adapter}")
    if result.stopped:
        say(f"{result.stopped}; what came out is the checkpoint of step {result.adapter_step}")


def labelled(sources: Sequence[Path]) -> dict[str, Path]:
    """The files by name, with as much of their paths as tells them apart; raises UserError for one given twice."""
    places: dict[Path, Path] = {}
    for source in sources:
        if (first := places.setdefault(source.resolve(), source)) is not source:
            raise UserError(f"{source} is the same file as {first}, expected each once")
    labels = {}
    for place, source in places.items():
        others = [other.parts for other in places if other != place]
        length = next(
            n for n in range(1, len(place.parts) + 1) if all(o[-n:] != place.parts[-n:] for o in others)
        )
        labels["/".join(place.parts[-length:])] = source
    return labels


def _recipe(model: str, overrides: Sequence[str]) -> Recipe:
    """A recipe of one arm, which is only trained."""
    values: dict[str, Any] = {
        "run": {"name": "train", "languages": ["en"]},
        "policy": {"model": model},
        **NO_PROMPTS,
        "arms": {ARM: {}},
    }
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.partition(".")[0] not in SECTIONS and key != "run.seed":
            raise UserError(f"--set {override}: expected a key of {', '.join(SECTIONS)}, or run.seed")
        if key == "policy.model":
            raise UserError(f"--set {override}: expected --model")
        apply_override(values, override)
    return from_dict(values, "croco train")


def _stands(to: Path, fingerprint: str) -> str:
    """Whether the folder is new, or holds an unfinished or finished training on the same; raises UserError else."""
    if not to.exists() or (to.is_dir() and {path.name for path in to.iterdir()} <= {LOCK}):
        return "new"
    if not (to / RECORD).is_file():
        raise UserError(f"{to} holds no {RECORD}, expected a new folder or one that `croco train` began")
    found = files.read_json(to / RECORD)
    if not isinstance(found, dict) or not {"fingerprint", "state"} <= found.keys():
        raise UserError(f"{to / RECORD} is not what `croco train` writes, expected a new folder")
    if found["fingerprint"] != fingerprint:
        raise UserError(
            f"{to} was made from other files or settings (see its {RECORD}), expected another folder"
        )
    return str(found["state"])


def _check_made(to: Path) -> None:
    """Raise UserError where a finished training is not as it was made; those of earlier versions have no digests."""
    digests = files.read_json(to / RECORD).get("digests", {})
    try:
        if not isinstance(digests, dict):
            raise UserError(f"{to / RECORD} has digests that are none")
        for name, content in digests.items():
            files.check_digest(to / name, content)
    except UserError as error:
        raise UserError(f"{error}: remove {to} to train again") from None


def _pairs(
    sources: Sequence[Path],
    mapped: Mapping[str, str],
    columns: Sequence[str],
    language: str | None,
    chosen_only: bool,
    to: Path,
) -> tuple[pl.DataFrame, list[Drop]]:
    """The pairs of the files, made from scored completions where a row has no chosen and rejected, and the ledger."""
    first = next((row for source in sources for _, row in file_rows(source)), None)
    if isinstance(first, Mapping) and "chosen" not in first and "completions" in first:
        made = to / "scratch" / "paired"
        pairs_of_files(sources, made, columns, language, [], "preference", "unknown")
        drops = [
            row
            for table in ("sample", "pairs")
            for row in shards.read_dropped(made / table).select(DROPPED.schema.names).rows()
            if row[0] != "flag"  # a mark
        ]
        return shards.read_table(made / "pairs"), drops
    return import_pairs(sources, mapped, language, chosen_only)


def _write_pairs(folder: Path, pairs: pl.DataFrame) -> None:
    """A shard as it is, of the columns that training reads."""
    table = pairs.to_arrow()
    count = {"pair": pairs.height}
    shards.write_shard(folder, 0, table, table.schema, read=count, written=count, dropped=None)


def _tuned(recipe: Recipe, to: Path) -> TrainResult:
    job = TrainJob(
        policy=recipe.policy,
        runtime=recipe.runtime,
        training=recipe.arms[ARM].training,
        folder=to,
        pairs=to / "scratch" / "pairs",
        title="train",
        seed=recipe.run.seed,
    )
    with ExitStack() as stack:
        bars: list[Progress] = []

        def advance(step: int, num_steps: int) -> None:
            if not bars:
                bars.append(stack.enter_context(progress("train", num_steps, "step", step - 1)))
            bars[0].advance()

        return tune(job, advance)


def _card(
    recipe: Recipe,
    made_from: Mapping[str, Any],
    result: TrainResult,
    pairs: pl.DataFrame,
    left_out: int,
    license: str,
) -> str:
    hub, base = base_name(recipe.policy.model, recipe.policy.revision)
    codes = [code for code in pairs["language"].unique().sort().to_list() if code != "und"]
    last = result.metrics.get("validation", result.metrics["train"])
    return model_card(
        title=f"Tuned on {', '.join(made_from['files'])}",
        base=hub,
        languages=codes,
        license=license,
        tables={
            "What it was made from": [
                ("policy", base),
                *((f"pairs: {name}", identity) for name, identity in made_from["files"].items()),
                ("pairs trained on, held out", f"{result.pairs:,}, {result.validation_pairs:,}"),
                ("pairs left out", f"{left_out:,}"),
                ("steps, step of these weights", f"{result.steps:,}, {result.adapter_step:,}"),
                ("stopped early", result.stopped or "no"),
            ],
            "How it was tuned": settings_rows(made_from["training"]),
            "Last metrics": [(name, f"{value:.4g}") for name, value in last.items()],
        },
        library="transformers" if recipe.arms[ARM].training.full else "peft",
    )
