"""`[arms.NAME]` of the recipe: where completions come from, who scores them, how pairs are chosen.

The stages take these very records, so every default is written once, here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from croco.config.models import Causal, Model, Reward
from croco.config.rules import CALIBRATIONS, PROMPTS, parse_chosen, parse_rejected
from croco.config.runtime import Positive, Section
from croco.config.sweep import MAX_ROUNDS
from croco.config.training import NotNegative, Strings, Training
from croco.errors import UserError

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]
Completions = Annotated[int, Field(ge=2, le=100_000)]
Part = Annotated[tuple[Positive, Positive], Field(strict=False)]
Scorer = Literal["reward", "random", "likelihood", "likelihood-sum", "verified", "implicit", "alignment"]
Action = Literal["drop", "flag", "off"]
ENGLISH = "en"


# Where completions and scores come from -------------------------------------------------------------------------------


class Sampler(Causal):
    """Another model that samples in the policy's place, under the policy's instruction and [sampling]."""


class Implicit(Section):
    """The reward that a DPO arm has become (ICR): its log-probability over the base's, under the English prompt."""

    arm: Name
    """An arm tuned on English alone."""
    instruction: str = "Please answer in {language}."
    """Put before the English prompt; {language} is the completion's, in English."""


class Alignment(Model):
    """The translation model that scores completions by how well they go into the English ones (MAPO)."""

    codes: dict[str, str] = Field(default_factory=dict)
    """A language's token in the model's vocabulary; M2M100's own form `__da__` where there is none here."""
    targets: Positive | None = None
    """English completions of a prompt that count, the first ones; null is all."""
    max_tokens: Positive = 512
    """Of a completion; a longer one goes to the ledger."""


class Origin(Section):
    """The part of an arm before its pairs are chosen."""

    languages: Strings = ()
    """Tuned on these; none named is all of run.languages."""
    completions: Completions | None = None
    """Per prompt, the first ones of those that are sampled; null is all (sampling.completions)."""
    part: Part | None = None
    """[2, 4] is the second of four parts of the prompts."""
    start: Name | None = None
    """The arm whose policy samples, and whose adapter is trained further."""
    reference: Literal["base", "start"] = "base"
    """What DPO holds the policy against."""
    rounds: Annotated[int, Field(gt=0, le=MAX_ROUNDS)] = 1
    """As many arms one after the other, each on its own part of the prompts, from the one before."""
    sampler: Sampler | None = None
    """Another model whose completions are used (off-policy)."""
    scorer: Scorer = "reward"
    """What scores the completions."""
    reward: Reward | None = None
    """Another reward than [reward], for this arm alone."""
    implicit: Implicit | None = None
    """For scorer "implicit"."""
    evaluated: bool = True
    """False: only other arms build on it."""

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
        if self.reward and self.scorer != "reward":
            raise ValueError(f'reward is there, and scorer = "{self.scorer}": expected one of them')
        if (self.scorer == "implicit") != (self.implicit is not None):
            needed = "is missing" if self.scorer == "implicit" else f'is there, and scorer = "{self.scorer}"'
            raise ValueError(
                f'implicit {needed}: scorer = "implicit" and implicit = {{ arm = … }} go together'
            )
        return self


# How pairs are chosen -------------------------------------------------------------------------------------------------


class Guards(Section):
    """What becomes of a completion or pair that a guard catches: "drop" leaves it out, "flag" marks its pair."""

    cut: Action = "drop"
    """A completion cut at the token limit."""
    empty: Action = "drop"
    """A completion without a visible character."""
    too_long: Action = "drop"
    """Prompt and completion have more than training.max_tokens."""
    wrong_language: Action = "drop"
    """A completion in another language: "drop" judges every completion, "flag" those that are picked."""
    min_letters: Positive = 20
    """A shorter text is in no language."""
    duplicate: Action = "drop"
    """The text of an earlier completion of the prompt."""
    near_duplicate: Action = "drop"
    """The same but for case and white space."""
    score_gap: Action = "off"
    """A pair whose scores differ by less than min_score_gap."""
    min_score_gap: NotNegative = 0.0
    """The difference that score_gap asks for, in the scorer's units."""
    length_ratio: Action = "off"
    """A pair with one side longer than max_length_ratio times the other."""
    max_length_ratio: Annotated[float, Field(ge=1)] = 3.0
    """The ratio that length_ratio allows."""


class Contrast(Section):
    """How pairs are chosen; `croco.config.rules` has the words."""

    pool: Literal["language", "all"] | dict[Name, Strings] = "language"
    """Which completions compete: one prompt in one language, in all, or in named groups ({ nordic = ["da", "sv"] })."""
    calibration: Literal[CALIBRATIONS] = "none"  # type: ignore[valid-type]
    """How scores are made comparable before they are pooled."""
    chosen: str = "max"
    """The rule of the chosen completion: max, mean+K*std, quantile:Q, reference (the gold completion)."""
    rejected: str = "mean-2std"
    """That of the rejected: mean-K*std, quantile:Q, q1, mean, min, gap:X; none is the default of method "sft"."""
    prompt: Literal[PROMPTS] = "chosen"  # type: ignore[valid-type]
    """Whose language the pair's prompt is in."""
    pairs_per_pool: Annotated[int, Field(gt=0, le=100_000)] = 1
    """Pairs that a pool gives at most."""
    guards: Guards = Guards()
    """[guards] with this arm's values over it."""

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        try:
            chosen, rejected = parse_chosen(self.chosen), parse_rejected(self.rejected)
        except UserError as error:
            raise ValueError(str(error)) from None
        if rejected.kind == "none" and self.prompt in ("rejected", "random"):
            raise ValueError(f'prompt = "{self.prompt}" needs a rejected completion, and rejected = "none"')
        if self.calibration == "length" and (chosen.kind, rejected.kind) != ("max", "min"):
            raise ValueError(
                f'calibration = "length" evens out the lengths of best and worst: expected chosen = "max" and '
                f'rejected = "min", found "{self.chosen}" and "{self.rejected}"'
            )
        return self


# The arm, and grids of arms -----------------------------------------------------------------------------------------


class Arm(Origin, Contrast):
    """One way to tune the policy."""

    training: Training = Training()
    """[training] with this arm's values over it."""

    @model_validator(mode="before")
    @classmethod
    def _sft_needs_no_rejected(cls, values: Any) -> Any:
        training = values.get("training") if isinstance(values, dict) else None
        method = training.get("method") if isinstance(training, dict) else getattr(training, "method", None)
        return {"rejected": "none", **values} if method == "sft" else values

    @model_validator(mode="before")
    @classmethod
    def _implicit_scores_are_length_controlled(cls, values: Any) -> Any:
        implicit = isinstance(values, dict) and values.get("scorer") == "implicit"
        return {"rejected": "min", "calibration": "length", **values} if implicit else values

    @model_validator(mode="after")
    def _check_method_and_scorer(self) -> Self:
        if self.rejected == "none" and self.training.method != "sft":
            raise ValueError(
                'rejected = "none" makes data for training.method = "sft", which this arm is not'
            )
        if (
            self.chosen == "reference"
            and self.rejected != "none"
            and (self.scorer != "reward" or self.reward)
        ):
            other = "reward of its own" if self.reward else f'scorer = "{self.scorer}"'
            raise ValueError(f'chosen = "reference" is scored by [reward], and the arm has a {other}')
        return self


class Sweep(Section):
    """A grid of arms: those of arm `of` with the values of the grid over it."""

    of: Name
    """The arm that is varied."""
    grid: dict[str, list[Any]] = Field(min_length=1)
    """A key of an arm and the values that it takes; written as keys of the sweep itself."""
    arms: dict[str, dict[str, Any]]
    """Made, not written: each arm and its place in the grid."""
