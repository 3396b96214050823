"""The recipe: one experiment, as frozen and strict records; `load.py` reads it, `checks.py` compares its sections.

Strict, because a misspelt key that is ignored costs a GPU week. The text under a key is its line in the recipe
reference and what an editor shows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from croco.config.arms import Alignment, Arm, Completions, Guards, Name, Sweep
from croco.config.evaluation import Arena, EuroEval, Source
from croco.config.models import Judge, Policy, Reward, Translate
from croco.config.runtime import Language, Positive, Runtime, Section, Seed
from croco.config.study import Study
from croco.config.training import Training
from croco.storage.hashing import LAB_LANGUAGES

NAME_BYTES = 255  # of a file or folder
PATH_BYTES = 3500  # of a run's folder: the system takes 4,096 with what lies in it
Languages = Annotated[tuple[Language, ...], Field(strict=False)]
Temperature = Annotated[float, Field(ge=0, le=10)]
# TOML has arrays, the frozen record has tuples
Temperatures = Annotated[tuple[Temperature, ...], Field(strict=False)]


class Run(Section):
    """What the run is called, and its languages."""

    name: Name
    """Of the run, and of its folder where none is given."""
    folder: str = ""
    """Where everything is written; "" is runs/NAME."""
    seed: Seed = 0
    """Every seed of the run derives from it."""
    languages: Languages = Field(min_length=1)
    """Tuned, and evaluated."""
    low_resource_languages: Languages = ()
    """Evaluated only; a group of their own in the tables."""
    held_out_languages: Languages = ()
    """Evaluated only, likewise."""

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Every language of the evaluation: the tuned ones first."""
        return self.languages + self.low_resource_languages + self.held_out_languages

    @model_validator(mode="after")
    def _check_languages(self) -> Run:
        for code in self.evaluated:
            if self.evaluated.count(code) > 1:
                raise ValueError(
                    f"'{code}' appears twice in languages, low_resource_languages and held_out_languages"
                )
        return self

    @model_validator(mode="after")
    def _folder_can_be_made(self) -> Run:
        if "\0" in self.folder:
            raise ValueError(f"folder = {self.folder!r} holds a null character, expected a path")
        if any(len(os.fsencode(part)) > NAME_BYTES for part in (*Path(self.folder).parts, self.name)):
            raise ValueError(
                f"a name in '{self.folder or self.name}' has more than {NAME_BYTES} bytes, expected a shorter one"
            )
        if len(os.fsencode(os.path.abspath(self.folder))) > PATH_BYTES:
            raise ValueError(f"folder has more than {PATH_BYTES} bytes, expected a shorter path")
        return self


class Prompts(Source):
    """The prompts to tune on."""

    source: str = "lab"
    """"lab", "lab:lists", a file (.jsonl, .jsonl.gz, .json, .parquet), a pattern, a folder, "hf:NAME?config=NAME"."""
    order: Literal["source", "seed"] = "source"
    """"seed": shuffled by run.seed, so that another seed tunes on other prompts."""


class Sampling(Section):
    """How the policy samples completions."""

    completions: Completions = 16
    """Of each prompt; mean-2std differs from the minimum from 16 on."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Above 0: at 0 all completions of a prompt are one."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of probability that is sampled from; 1 is all."""
    top_k: Annotated[int, Field(ge=0, le=10**9)] = 0
    """The number of tokens that are sampled from; 0 is all."""
    max_new_tokens: Positive = 512
    """Of a completion; one that has not ended by then is cut."""
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)] = ()
    """Strings that end a completion and are left out of it."""


class Evaluation(Source):
    """The test prompts, and how every arm's policy answers them."""

    source: str = "lab"
    """As in [prompts]; other prompts than those tuned on."""
    split: str = "test"
    """Of the lab or a hub data set."""
    temperatures: Temperatures = Field(default=(0.0, 1.0), min_length=1)
    """At which every arm answers; 0 is greedy."""
    base_temperatures: Temperatures = ()
    """At which the untuned policy answers too."""
    samples: Annotated[int, Field(gt=0, le=10_000)] = 1
    """Per prompt and temperature above 0."""
    max_new_tokens: Positive = 512
    """Of a completion."""
    reward: Reward | None = None
    """The reward model that scores the answers, best another one than [reward], which picked the pairs; if not given,
    that of [reward], and for the lab's prompts the lab's program."""
    bootstrap: Annotated[int, Field(gt=0, le=100_000)] = 2000
    """Resamples of an interval."""
    kl: bool = False
    """Measure how far every arm went from the base: KL, of its completions at temperature 1."""


class Recipe(Section):
    """One experiment."""

    run: Run
    prompts: Prompts = Prompts()
    translate: Translate | None = None
    policy: Policy = Policy()
    reward: Reward = Reward()
    alignment: Alignment | None = None
    sampling: Sampling = Sampling()
    guards: Guards = Guards()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    euroeval: EuroEval | None = None
    arena: Arena | None = None
    judge: Judge | None = None
    arms: dict[Name, Arm] = Field(default_factory=dict, min_length=1)
    sweep: dict[str, Sweep] = Field(default_factory=dict)
    study: Study | None = None
    runtime: Runtime = Runtime()

    @property
    def evaluation_reward(self) -> Reward | None:
        """What scores the answers to the test prompts; None for the lab's program."""
        return self.evaluation.reward or (None if self.evaluation.source in LAB_LANGUAGES else self.reward)

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
        translated = self.translate and self.translate.evaluation
        return (self.translate.source,) if self.translate and translated else self.run.evaluated

    @property
    def evaluated_arms(self) -> list[str]:
        """The arms whose policies answer the test prompts; the others are steps on the way to them."""
        return [name for name, arm in self.arms.items() if arm.evaluated]

    @property
    def arena_languages(self) -> tuple[str, ...]:
        return (self.arena.languages if self.arena else ()) or self.run.evaluated

    def languages_of(self, arm: Arm) -> tuple[str, ...]:
        """The languages that an arm is tuned on, in the order of run.languages."""
        return tuple(code for code in self.run.languages if not arm.languages or code in arm.languages)

    @field_validator("arms")
    @classmethod
    def _base_is_reserved(cls, arms: dict[str, Arm]) -> dict[str, Arm]:
        if "base" in arms:
            raise ValueError("'base' is the untuned policy, which is always there: expected another name")
        return arms
