"""Where an arm's completions come from and who scores them, and what arms that build on each other must agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from croco.config.models import Causal, Model
from croco.config.rules import check_groups
from croco.config.runtime import Positive, Section
from croco.config.sweep import MAX_ROUNDS
from croco.errors import UserError

if TYPE_CHECKING:
    from croco.config.arm import Arm
    from croco.config.recipe import Recipe

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]
Strings = Annotated[tuple[str, ...], Field(strict=False)]
Completions = Annotated[int, Field(ge=2, le=100_000)]
Part = Annotated[tuple[Positive, Positive], Field(strict=False)]
Scorer = Literal["reward", "random", "likelihood", "likelihood-sum", "verified", "implicit", "alignment"]
ENGLISH = "en"


class Sampler(Causal):
    """Another model that samples in the policy's place, under the policy's instruction and [sampling]."""


class Implicit(Section):
    """The reward that a DPO arm has become (ICR): its log-probability over the base's, under the English prompt."""

    arm: Name  # tuned on English alone
    # put before the English prompt; {language} is the completion's, in English
    instruction: str = "Please answer in {language}."


class Alignment(Model):
    """The translation model that scores completions by how well they go into the English ones (MAPO)."""

    # a language's token in the model's vocabulary; M2M100's own form "__da__" where there is none here
    codes: dict[str, str] = Field(default_factory=dict)
    targets: Positive | None = None  # English completions of a prompt, the first ones; null is all
    max_tokens: Positive = 512  # of a completion; a longer one goes to the ledger


class Origin(Section):
    """The part of an arm before its pairs are chosen."""

    languages: Strings = ()  # tuned on these; () is all of run.languages
    # per prompt, the first ones of those that are sampled; null is all (sampling.completions)
    completions: Completions | None = None
    part: Part | None = None  # [2, 4] is the second of four parts of the prompts
    start: Name | None = None  # the arm whose policy samples, and whose adapter is tuned on
    reference: Literal["base", "start"] = "base"  # what DPO holds the policy against
    rounds: Annotated[int, Field(gt=0, le=MAX_ROUNDS)] = (
        1  # as many arms, each on its own part of the prompts, from the one before
    )
    sampler: Sampler | None = None  # completions of another model: off-policy
    scorer: Scorer = "reward"
    implicit: Implicit | None = None  # for scorer "implicit"
    evaluated: bool = True  # false: only others build on it

    @model_validator(mode="after")
    def _check_origin(self) -> Origin:
        if self.sampler and (self.start or self.rounds > 1):
            raise ValueError("the completions are sampler's or the own policy's: expected no sampler here")
        if self.reference == "start" and not self.start and self.rounds == 1:
            raise ValueError('reference = "start" needs the arm that it starts from: start is missing')
        if self.part and self.part[0] > self.part[1]:
            raise ValueError(f"part = [{self.part[0]}, {self.part[1]}], expected such as [1, 4] to [4, 4]")
        if self.part and self.rounds > 1:
            raise ValueError("rounds have their own parts of the prompts: expected no part here")
        if (self.scorer == "implicit") != (self.implicit is not None):
            needed = "is missing" if self.scorer == "implicit" else f'is there, and scorer = "{self.scorer}"'
            raise ValueError(
                f'implicit {needed}: scorer = "implicit" and implicit = {{ arm = … }} go together'
            )
        return self


class Sweep(Section):
    """A grid of arms: those of arm `of` with the values of the grid over it."""

    of: Name
    grid: dict[str, list[Any]] = Field(min_length=1)  # a key of an arm -> its values
    arms: dict[str, dict[str, Any]]  # made: arm -> its place in the grid; `of` itself may be one


# Checks over arms -----------------------------------------------------------------------------------------------------


def check_arms(recipe: Recipe) -> None:
    """Raise ValueError naming the arm for what one arm alone cannot know."""
    for name, arm in recipe.arms.items():
        for code in arm.languages:
            if code not in recipe.run.languages:
                known = ", ".join(recipe.run.languages)
                raise ValueError(f"arms.{name}.languages: '{code}' is not tuned, expected of {known}")
        try:
            check_groups(arm.pool, recipe.run.languages)
        except UserError as error:
            raise ValueError(f"arms.{name}.pool: {error}") from None
        shared = not arm.start and not arm.sampler
        if shared and arm.completions and arm.completions > recipe.sampling.completions:
            raise ValueError(
                f"arms.{name}.completions = {arm.completions}, but only sampling.completions = "
                f"{recipe.sampling.completions} are sampled"
            )
        if arm.sampler and recipe.runtime.engines.sample == "server":
            raise ValueError(
                f"arms.{name}.sampler is another model than the one that runtime.servers.sample serves: expected "
                f"runtime.engines.sample = 'transformers' or 'vllm'"
            )
        _check_start(recipe, name, arm)
        _check_scorer(recipe, name, arm)
    _check_cycles(recipe)


def _check_start(recipe: Recipe, name: str, arm: Arm) -> None:
    if arm.start is None:
        return
    other = _known(recipe, f"arms.{name}.start", arm.start)
    for key in ("rank", "alpha", "targets"):
        if getattr(other.training.lora, key) != getattr(arm.training.lora, key):
            raise ValueError(
                f"arms.{name} goes on training the adapter of '{arm.start}': expected the same training.lora.{key}"
            )


def _check_scorer(recipe: Recipe, name: str, arm: Arm) -> None:
    languages = languages_of(recipe, arm)
    if arm.scorer == "verified" and recipe.prompts.source != "lab":
        raise ValueError(
            f"arms.{name}.scorer = 'verified' is the lab's program: expected prompts.source = 'lab'"
        )
    if arm.scorer == "alignment":
        if recipe.alignment is None:
            raise ValueError(f"arms.{name}.scorer = 'alignment' needs [alignment] with a translation model")
        if ENGLISH not in recipe.run.languages or set(languages) == {ENGLISH}:
            raise ValueError(
                f"arms.{name}.scorer = 'alignment' sets completions of other languages beside English ones: "
                f"expected '{ENGLISH}' and others in run.languages"
            )
    if arm.implicit is not None:
        other = _known(recipe, f"arms.{name}.implicit.arm", arm.implicit.arm)
        if set(languages_of(recipe, other)) != {ENGLISH} or other.training.method != "dpo" or other.start:
            raise ValueError(
                f"arms.{name}.implicit.arm = '{arm.implicit.arm}', expected an arm that is tuned by DPO from the base "
                f'on languages = ["{ENGLISH}"]'
            )
        if "{language}" not in arm.implicit.instruction:
            raise ValueError(f"arms.{name}.implicit.instruction does not name its {{language}}")


def _check_cycles(recipe: Recipe) -> None:
    for name in recipe.arms:
        path, todo = [name], [name]
        while todo:
            arm = recipe.arms[todo.pop()]
            for before in (arm.start, arm.implicit.arm if arm.implicit else None):
                if before == name:
                    raise ValueError(f"arms.{name} starts from itself, by way of {' and '.join(path)}")
                if before and before not in path:
                    path.append(before)
                    todo.append(before)


def _known(recipe: Recipe, key: str, name: str) -> Arm:
    if name not in recipe.arms:
        others = ", ".join(recipe.arms)
        raise ValueError(f"{key} = '{name}', expected an arm of this recipe: one of {others}")
    return recipe.arms[name]


def languages_of(recipe: Recipe, arm: Arm) -> tuple[str, ...]:
    """The languages that an arm is tuned on, in the order of run.languages."""
    return tuple(code for code in recipe.run.languages if not arm.languages or code in arm.languages)
