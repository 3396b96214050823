"""Reads a recipe: TOML or JSON, `--set` values over it, sweeps and rounds made into arms, then checked as a whole."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from croco.config.arms import Arm
from croco.config.checks import check
from croco.config.errors import sentence
from croco.config.recipe import Recipe, Sampling
from croco.config.sweep import expanded
from croco.errors import UserError

# what an arm has by default
ARM_DEFAULTS = {
    **{name: field.default for name, field in Arm.model_fields.items()},
    "sampling.completions": Sampling.model_fields["completions"].default,
}
# what a command on files puts in the place of sections that it does not read
NO_PROMPTS = {
    "prompts": {"source": "files.jsonl"},
    "reward": {"model": "lab:reward"},
    "evaluation": {"source": "none.jsonl"},
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe (TOML, or the resolved `recipe.json` of a run) with `a.b=value` overrides; raises UserError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a recipe in TOML, found {error}") from None
    if path.suffix == ".json":
        from croco.storage.files import read_json

        values = read_json(path)
    else:
        try:
            values = tomllib.loads(text)
        except (RecursionError, ValueError) as error:
            raise UserError(f"{path}: not valid TOML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a recipe's tables, found {type(values).__name__}")
    for override in overrides:
        apply_override(values, override)
    return from_dict(values, str(path))


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `a.b=value` in nested values; raises UserError when it does not fit."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {override}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (RecursionError, ValueError):
        value = text
    for part in parts[:-1]:
        below = values.setdefault(part, {})
        if not isinstance(below, dict):
            raise UserError(f"--set {override}: '{part}' is a value, expected a table")
        values = below
    values[parts[-1]] = value


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested tables as one; where both have a value, `over` has it."""
    result = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def from_dict(values: Mapping[str, Any], file: str = "recipe") -> Recipe:
    """Check nested values as a recipe; `file` is what an error names."""
    try:
        values = expanded(values, ARM_DEFAULTS)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    for key in ("training", "guards"):  # each arm has them, with its own values over the common ones
        common, arms = values.get(key, {}), values.get("arms", {})
        if isinstance(common, dict) and isinstance(arms, dict):
            values["arms"] = {
                name: {**arm, key: merged(common, arm.get(key, {}))}
                if isinstance(arm, dict) and isinstance(arm.get(key, {}), dict)
                else arm
                for name, arm in arms.items()
            }
    try:
        recipe = Recipe.model_validate(values)
        json.dumps(recipe.model_dump(mode="json"), ensure_ascii=False).encode()
        check(recipe)
    except ValidationError as error:
        raise UserError(f"{file}: {sentence(error, Recipe)}") from None
    except (ValueError, UserError) as error:
        raise UserError(f"{file}: {error}") from None
    return recipe
