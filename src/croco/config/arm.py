"""An arm of the recipe: which pairs it makes of which completions, and how the policy is tuned on them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from croco.config import rules
from croco.config.arms import Name, Origin, Strings
from croco.config.runtime import Positive, Section
from croco.config.sentinel import Sentinel
from croco.errors import UserError

Share = Annotated[float, Field(ge=0, le=1)]
Action = Literal["drop", "flag", "off"]


class Lora(Section):
    rank: Positive = 16
    alpha: Positive = 32
    dropout: Share = 0.05
    targets: Strings = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Training(Section):
    method: Literal["dpo", "sft"] = "dpo"
    loss: Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "simpo", "sigmoid_norm"] = "sigmoid"
    beta: Annotated[float, Field(gt=0)] = 0.1
    # loss "robust": the share of pairs whose label is wrong
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    simpo_gamma: Annotated[float, Field(ge=0)] = 0.5  # loss "simpo": the margin aimed at
    nll_weight: Annotated[float, Field(ge=0)] = 0.0
    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    epochs: Annotated[int, Field(gt=0, le=1000)] = 1
    updates: Annotated[int, Field(gt=0, le=500_000)] | None = (
        None  # optimiser steps, whatever the number of pairs; null is what epochs make
    )
    batch_pairs: Annotated[int, Field(gt=0, le=1_000_000)] = 64  # pairs per optimiser step
    max_tokens: Positive = 4096  # prompt and completion
    # what becomes of a longer pair: to the ledger, or its completions lose their ends (counted)
    over_length: Literal["drop", "truncate"] = "drop"
    warmup_ratio: Share = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    full: bool = False  # tune all weights instead of adapters; [training.lora] is not read then
    lora: Lora = Lora()
    sentinel: Sentinel = Sentinel()
    # of the prompts, held out: the sentinel watches them, and the best checkpoint is chosen on them
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02


class Guards(Section):
    """What becomes of a completion or pair that a guard catches: left out, marked in its pair, or nothing."""

    cut: Action = "drop"  # at the token limit
    empty: Action = "drop"
    too_long: Action = "drop"  # prompt and completion, for training.max_tokens
    wrong_language: Action = "flag"  # "drop" judges every completion, "flag" those that were picked
    min_letters: Positive = 20  # a shorter text is in no language
    duplicate: Action = "drop"  # of an earlier completion of the prompt
    near_duplicate: Action = "drop"  # but for case and white space
    score_gap: Action = "off"  # chosen above rejected by less than min_score_gap
    min_score_gap: Annotated[float, Field(ge=0)] = 0.0
    length_ratio: Action = "off"  # one side longer than max_length_ratio times the other
    max_length_ratio: Annotated[float, Field(ge=1)] = 3.0


class Arm(Origin):
    # one prompt in one language, in all languages, or named groups of languages: { nordic = ["da", "nb", "sv"] }
    pool: Literal["language", "all"] | dict[Name, Strings] = "language"
    calibration: Literal["none", "zscore", "quantile", "centred", "length"] = "none"
    chosen: str = "max"  # max, mean+K*std, quantile:Q, reference
    rejected: str = (
        "mean-2std"  # mean-K*std, quantile:Q, q1, mean, min, gap:X; none (the default of method "sft")
    )
    prompt: Literal["chosen", "rejected", "random", "each"] = (
        "chosen"  # whose language the pair's prompt is in
    )
    pairs_per_pool: Positive = 1
    guards: Guards = Guards()  # [guards] with this arm's values over it
    training: Training = Training()  # [training] with this arm's values over it

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
    def _check_rules(self) -> Arm:
        try:
            chosen, rejected = rules.parse_chosen(self.chosen), rules.parse_rejected(self.rejected)
        except UserError as error:
            raise ValueError(str(error)) from None
        if rejected.kind == "none" and self.training.method != "sft":
            raise ValueError(
                'rejected = "none" makes data for training.method = "sft", which this arm is not'
            )
        if rejected.kind == "none" and self.prompt in ("rejected", "random"):
            raise ValueError(f'prompt = "{self.prompt}" needs a rejected completion, and rejected = "none"')
        if self.calibration == "length" and (chosen.kind, rejected.kind) != ("max", "min"):
            raise ValueError(
                f'calibration = "length" evens out the lengths of best and worst: expected chosen = "max" and '
                f'rejected = "min", found "{self.chosen}" and "{self.rejected}"'
            )
        if chosen.kind == "reference" and self.scorer != "reward" and rejected.kind != "none":
            raise ValueError(
                f'chosen = "reference" is scored by the reward model, and scorer = "{self.scorer}"'
            )
        return self
