"""The recipe: one experiment as a sparse TOML file, read into frozen and strict records.

Strict, because a misspelt key that is ignored costs a GPU week: an unknown key is an error that names the nearest known
one, a wrong type or value an error that names file and key. Functions below a stage take plain arguments, never the
recipe. It loads neither torch nor a model; whether a model exists is `storage/hashing.py`'s question.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from croco import languages
from croco.config.arena import Arena, Source, has_splits
from croco.config.arm import Arm, Guards, Training
from croco.config.arms import Alignment, Completions, Name, Strings, Sweep, check_arms
from croco.config.euroeval import EuroEval
from croco.config.models import Judge, Policy, Reward, Translate
from croco.config.rules import check_groups
from croco.config.runtime import Positive, Runtime, Section, Seed
from croco.config.study import Study, check_study
from croco.config.sweep import expanded
from croco.errors import UserError
from croco.storage.hashing import LAB_LANGUAGES

NAME_BYTES = 255  # of a file or folder
Temperature = Annotated[float, Field(ge=0, le=10)]
# TOML has arrays, the frozen record has tuples
Temperatures = Annotated[tuple[Temperature, ...], Field(strict=False)]


class Run(Section):
    name: Name
    folder: str = ""  # "" is runs/<name>
    seed: Seed = 0
    languages: Strings = Field(min_length=1)  # tuned
    low_resource_languages: Strings = ()  # evaluated only
    held_out_languages: Strings = ()  # evaluated only

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Every language of the evaluation: the tuned ones first."""
        return self.languages + self.low_resource_languages + self.held_out_languages

    @model_validator(mode="after")
    def _check_languages(self) -> Run:
        for code in self.evaluated:
            try:
                languages.check(code)
            except UserError as error:
                raise ValueError(str(error)) from None
            if self.evaluated.count(code) > 1:
                raise ValueError(
                    f"'{code}' appears twice in languages, low_resource_languages and held_out_languages"
                )
        return self


class Prompts(Source):
    source: str = "lab"
    # "seed": shuffled by run.seed, so that another seed tunes on others
    order: Literal["source", "seed"] = "source"


class Sampling(Section):
    completions: Completions = 16
    # at temperature 0 all completions of a prompt are one
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=10**9)] = 0  # 0 is all
    max_new_tokens: Positive = 512
    # strings that end a completion, left out of it
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)] = ()


class Evaluation(Source):
    source: str = "lab"
    split: str = "test"
    temperatures: Temperatures = Field(default=(0.0, 1.0), min_length=1)  # every arm; 0 is greedy
    base_temperatures: Temperatures = ()  # the untuned policy, beside those above
    samples: Annotated[int, Field(gt=0, le=10_000)] = 1  # per prompt and temperature above 0
    max_new_tokens: Positive = 512
    bootstrap: Annotated[int, Field(gt=0, le=1_000_000)] = 2000  # resamples


class Recipe(Section):
    run: Run
    prompts: Prompts = Prompts()
    translate: Translate | None = None
    policy: Policy = Policy()
    reward: Reward = Reward()
    judge: Judge | None = None
    alignment: Alignment | None = None  # for scorer "alignment"
    sampling: Sampling = Sampling()
    guards: Guards = Guards()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    euroeval: EuroEval | None = None
    arena: Arena | None = None
    arms: dict[Name, Arm] = Field(default_factory=dict, min_length=1)
    sweep: dict[str, Sweep] = Field(default_factory=dict)  # grids of arms, as they were made
    study: Study | None = None
    runtime: Runtime = Runtime()

    @field_validator("run")
    @classmethod
    def _folder_can_be_made(cls, run: Run) -> Run:
        if "\0" in run.folder:
            raise ValueError(f"folder = {run.folder!r} holds a null character, expected a path")
        if any(len(os.fsencode(part)) > NAME_BYTES for part in (*Path(run.folder).parts, run.name)):
            raise ValueError(
                f"a name in '{run.folder or run.name}' has more than {NAME_BYTES} bytes, expected a shorter one"
            )
        return run

    @property
    def folder(self) -> Path:
        """The run's folder, as the recipe says it (relative to where the command runs)."""
        return Path(self.run.folder or f"runs/{self.run.name}")

    @property
    def prompts_languages(self) -> tuple[str, ...]:
        """The languages that `[prompts]` is read in: the tuned ones, or the one they are translated from."""
        return (self.translate.source,) if self.translate else self.run.languages

    @property
    def evaluation_languages(self) -> tuple[str, ...]:
        """The languages that `[evaluation]` is read in."""
        translated = self.translate and self.translate.evaluation
        return (self.translate.source,) if self.translate and translated else self.run.evaluated

    @property
    def evaluated_arms(self) -> list[str]:
        """The arms whose policies answer the test prompts; the others are steps on the way to them."""
        return [name for name, arm in self.arms.items() if arm.evaluated]

    @property
    def arena_languages(self) -> tuple[str, ...]:
        """The languages that [arena] compares in."""
        return (self.arena.languages if self.arena else ()) or self.run.evaluated

    @field_validator("arms")
    @classmethod
    def _base_is_reserved(cls, arms: dict[str, Arm]) -> dict[str, Arm]:
        if "base" in arms:
            raise ValueError("'base' is the untuned policy, which is always there: expected another name")
        return arms

    @model_validator(mode="after")
    def _groups_are_tuned(self) -> Recipe:
        for name, arm in self.arms.items():
            for group, codes in arm.pool.items() if isinstance(arm.pool, dict) else ():
                for code in codes:
                    if code not in (arm.languages or self.run.languages):
                        known = ", ".join(arm.languages or self.run.languages)
                        raise ValueError(
                            f"arms.{name}.pool.{group}: '{code}' is not tuned, expected of {known}"
                        )
            try:
                check_groups(arm.pool, arm.languages or self.run.languages)
            except UserError as error:
                raise ValueError(f"arms.{name}.pool: {error}") from None
        return self

    @model_validator(mode="after")
    def _arms_fit_together(self) -> Recipe:
        check_arms(self)
        if self.study:
            check_study(self)
        return self

    @model_validator(mode="after")
    def _euroeval_has_something_to_do(self) -> Recipe:
        if self.euroeval is None:
            return self
        for code in self.euroeval.datasets or ():
            if code not in self.run.evaluated:
                known = ", ".join(self.run.evaluated)
                raise ValueError(f"euroeval.datasets.{code}: not evaluated, expected of {known}")
        if not any(self.euroeval.datasets_of(code) for code in self.run.evaluated):
            raise ValueError(f"euroeval has no dataset in {', '.join(self.run.evaluated)}")
        for arm in self.runtime.euroeval.urls:
            if arm not in ("base", *self.evaluated_arms):
                known = ", ".join(("base", *self.evaluated_arms))
                raise ValueError(f"runtime.euroeval.urls.{arm}: no such arm, expected of {known}")
        return self

    @model_validator(mode="after")
    def _arena_has_a_judge(self) -> Recipe:
        arena = self.arena
        if arena is None:
            return self
        for code in arena.languages:
            if code not in self.run.evaluated:
                known = ", ".join(self.run.evaluated)
                raise ValueError(f"arena.languages: '{code}' is not evaluated, expected of {known}")
        source = arena.source or self.evaluation.source
        if arena.judge == "lab" and source != "lab":
            raise ValueError(f"arena.judge = 'lab' judges prompts of the lab, and they are of '{source}'")
        if arena.judge == "model" and self.judge is None:
            raise ValueError("arena.judge = 'model' is the model of [judge], which is missing")
        if arena.source and _same_rows(self.prompts, arena):
            raise ValueError(f"arena.source is '{arena.source}', the prompts tuned on: expected others")
        return self

    @model_validator(mode="after")
    def _the_lab_has_the_languages(self) -> Recipe:
        read = {"prompts": self.prompts_languages, "evaluation": self.evaluation_languages}
        for key, codes in (read | ({"arena": self.arena_languages} if self.arena else {})).items():
            if getattr(self, key).source == "lab" and (unknown := set(codes) - set(LAB_LANGUAGES)):
                raise ValueError(
                    f"{key}.source = 'lab' has no prompts in '{min(unknown)}', expected of {', '.join(LAB_LANGUAGES)}"
                )
        return self

    @model_validator(mode="after")
    def _something_to_translate(self) -> Recipe:
        if self.translate and not set(self.run.languages) - {self.translate.source}:
            raise ValueError(
                f"translate.source = '{self.translate.source}' is the only language of run.languages"
            )
        return self

    @model_validator(mode="after")
    def _test_prompts_apart(self) -> Recipe:
        tuning, test = self.prompts, self.evaluation
        if _same_rows(tuning, test):
            raise ValueError(f"evaluation.source is '{test.source}', the prompts tuned on: expected others")
        for key, section in (("prompts", tuning), ("evaluation", test)):
            if "split" in section.model_fields_set and not has_splits(section.source):
                default = type(section).model_fields["split"].default
                if section.split != default:
                    raise ValueError(
                        f"{key}.split is for the lab and for hub datasets, and '{section.source}' is a file"
                    )
        return self


def _same_rows(tuning: Source, test: Source) -> bool:
    """Whether two sections read the same rows of the same source."""
    assert tuning.source is not None
    rows = [section.of(None) for section in (tuning, test)]
    if not has_splits(tuning.source):
        rows = [{"source": of["source"], "data_files": of["data_files"]} for of in rows]
    return rows[0] == rows[1]


# what an arm has when nobody says otherwise
ARM_DEFAULTS = {
    **{name: field.default for name, field in Arm.model_fields.items()},
    "sampling.completions": Sampling.model_fields["completions"].default,
}


# what a command on files puts in the place of [prompts] and [evaluation], which it does not read
NO_PROMPTS = {"prompts": {"source": "files.jsonl"}, "evaluation": {"source": "none.jsonl"}}


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
        from croco.storage.shards import read_json

        values = read_json(path)
    else:
        try:
            values = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
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
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
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
        return Recipe.model_validate(values)
    except ValidationError as error:
        from croco.config.errors import sentence

        raise UserError(f"{file}: {sentence(error, Recipe)}") from None
