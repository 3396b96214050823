"""Stages called from Python with plain arguments: `croco.sample`, `croco.score`, `croco.train`.

Each runs one stage, and those before it, in a folder as `croco run` does: what is complete there is not made again.
Settings are named as in the recipe."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from croco.config.load import from_dict, load
from croco.errors import UserError
from croco.pipeline.run import run
from croco.stages.train.from_files import train_on_files
from croco.storage.shards import read_table

Section = Mapping[str, Any]
ROW = ("prompt_id", "language")


def sample(
    prompts: str | Path | Section,
    policy: str | Path | Section,
    to: str | Path,
    *,
    languages: Sequence[str],
    sampling: Section | None = None,
    runtime: Section | None = None,
    seed: int = 0,
) -> pl.DataFrame:
    """Completions of a policy: prompt_id, language, sample_id, messages, completion, finish_reason and token counts.

    `prompts` and `policy` are a source and a model as in a recipe, or the whole section as a dict. The tables stay in
    `to`. Raises UserError as `croco run` does, and StaleStage when `to` was made with other settings."""
    values: dict[str, Any] = {
        "run": {"name": "sample", "folder": str(to), "languages": list(languages), "seed": seed},
        "prompts": _section(prompts, "source"),
        "policy": _section(policy, "model"),
        "sampling": dict(sampling or {}),
        "runtime": dict(runtime or {}),
        "reward": {"model": "lab:reward"},  # until `score` is told another one
        "arms": {"pairs": {}},
        "evaluation": {"source": "hf:none"},  # nothing is evaluated here; the prompts' own would be refused
    }
    run(from_dict(values, "croco.sample"), until="sample")
    return _completions(Path(to))


def score(
    folder: str | Path, reward: str | Path | Section, *, runtime: Section | None = None
) -> pl.DataFrame:
    """What `sample` made in a folder, with a reward model's column `score`, ready for `croco.pairs`. A completion
    without a score is left out; the ledger `FOLDER/score/dropped.parquet` has the reason."""
    recipe = Path(folder) / "recipe.json"
    if not recipe.is_file():
        raise UserError(
            f"{folder} has no recipe.json, expected a folder that croco.sample or `croco run` made"
        )
    sections = {"reward": _section(reward, "model"), "runtime": runtime or {}}
    run(
        load(recipe, [line for name, section in sections.items() for line in _overrides(name, section)]),
        until="score",
    )
    scores = read_table(Path(folder) / "score", [*ROW, "sample_id", "score"])
    return _completions(Path(folder)).join(scores, on=(*ROW, "sample_id"), how="inner", maintain_order="left")


def train(
    pairs: str | Path | Sequence[str | Path],
    policy: str | Path,
    to: str | Path,
    *,
    training: Section | None = None,
    runtime: Section | None = None,
    columns: Mapping[str, str] | None = None,
    language: str | None = None,
    license: str = "unknown",
) -> Path:
    """Tune a policy on files or folders of pairs (such as `croco.export` writes); returns the folder of the adapter, or
    with training = {"full": True} of the model. `columns` maps our names of columns to the file's."""
    sources = [pairs] if isinstance(pairs, (str, Path)) else list(pairs)
    overrides = [*_overrides("training", training or {}), *_overrides("runtime", runtime or {})]
    mapped = [f"{ours}={theirs}" for ours, theirs in (columns or {}).items()]
    train_on_files(
        [Path(source) for source in sources], str(policy), Path(to), mapped, language, overrides, license,
        lambda line: None,
    )  # fmt: skip
    return next(path for name in ("adapter", "model") if (path := Path(to) / name).is_dir())


def _section(value: str | Path | Section, key: str) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {key: str(value)}


def _overrides(name: str, section: Section) -> list[str]:
    """The values of a section as `--set` takes them."""
    lines: list[str] = []
    for key, value in section.items():
        if isinstance(value, Mapping):
            lines += _overrides(f"{name}.{key}", value)
        else:
            lines.append(f"{name}.{key}={json.dumps(value, ensure_ascii=False)}")
    return lines


def _completions(folder: Path) -> pl.DataFrame:
    prompts = read_table(
        folder / ("translate" if (folder / "translate").is_dir() else "prompts"), [*ROW, "messages"]
    )
    columns = ["sample_id", "completion", "finish_reason", "prompt_tokens", "completion_tokens"]
    completions = read_table(folder / "sample", [*ROW, *columns])
    return completions.join(prompts, on=ROW, how="left", maintain_order="left")
