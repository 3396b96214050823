"""`[training]` of the recipe, and of an arm: how a policy is tuned on pairs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_serializer, field_validator, model_serializer

from croco.config.runtime import Positive, Section

Strings = Annotated[tuple[str, ...], Field(strict=False)]
Share = Annotated[float, Field(ge=0, le=1)]
AboveZero = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
USUAL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Lora(Section):
    """Low-rank adapters on linear layers."""

    rank: Annotated[int, Field(gt=0, le=65_536)] = 16
    """Of each adapter."""
    alpha: Positive = 32
    """An adapter is scaled by alpha / rank."""
    dropout: Share = 0.05
    """On an adapter's input."""
    targets: Literal["auto"] | Strings = "auto"
    """Names of layers that get an adapter, fused experts as "experts.down_proj"; "auto" is every linear layer of the
    language model."""

    @field_validator("targets", mode="before")
    @classmethod
    def _usual_names(cls, targets: Any) -> Any:
        return "auto" if targets in (USUAL_TARGETS, list(USUAL_TARGETS)) else targets

    @field_serializer("targets")
    def _as_ever(self, targets: tuple[str, ...] | str) -> Any:
        """As in the fingerprints of runs that had no "auto" yet, and had these names by default."""
        return USUAL_TARGETS if targets == "auto" else targets


class Sentinel(Section):
    """When tuning stops by itself: bounds in nats per token, on held-out pairs and on three training steps in a row."""

    enabled: bool = True
    """False: nothing stops tuning but numbers that are not finite."""
    evaluations: Annotated[int, Field(gt=0, le=10_000)] = 4
    """Of the held-out pairs, each with a checkpoint; the best of them becomes the policy."""
    max_chosen_drop: AboveZero = 1.0
    """Of the chosen's log-probability under the reference's."""
    max_kl: AboveZero = 1.5
    """Of the policy from the reference."""
    max_grad_norm_factor: Annotated[float, Field(gt=1)] = 100.0
    """Times the gradient norm of the first steps."""
    shortcut_auc: Annotated[float, Field(ge=0.5, le=1)] = 0.95
    """Every pair right within early_steps, while language, length or finish reason has this AUC; 1 never stops."""
    early_steps: Annotated[int, Field(ge=0)] = 20
    """Optimiser steps that shortcut_auc looks at."""


class Training(Section):
    """How a policy is tuned on pairs. Everything here changes what comes out; the layout on a machine is [runtime]."""

    method: Literal["dpo", "sft"] = "dpo"
    """Preference tuning, or the likelihood of the chosen completions."""
    sft_on: Literal["completion", "assistant", "conversation"] = "completion"
    """The tokens that method "sft" learns: the completion's, those of every turn of the assistant, or all."""
    loss: Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "simpo", "sigmoid_norm"] = "sigmoid"
    """Of method "dpo"."""
    beta: AboveZero = 0.1
    """How strongly DPO holds the policy to the reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Loss "robust": the share of pairs whose label is wrong."""
    simpo_gamma: NotNegative = 0.5
    """Loss "simpo": the margin aimed at."""
    nll_weight: NotNegative = 0.0
    """Weight of the chosen completions' likelihood beside the preference loss."""
    learning_rate: AboveZero = 5e-6
    """At its highest, after the warm-up."""
    epochs: Annotated[int, Field(gt=0, le=1000)] = 1
    """Passes over the pairs."""
    updates: Annotated[int, Field(gt=0, le=500_000)] | None = None
    """Optimiser steps, whatever the number of pairs; null is what the epochs make."""
    batch_pairs: Annotated[int, Field(gt=0, le=1_000_000)] = 64
    """Pairs per optimiser step, over all devices."""
    max_tokens: Positive = 4096
    """Of prompt and completion, the end token included."""
    over_length: Literal["drop", "truncate"] = "drop"
    """A longer pair goes to the ledger, or its completions lose their ends (counted)."""
    warmup_ratio: Share = 0.05
    """Of the steps, over which the learning rate rises."""
    warmup_rounding: Literal["down", "up"] = "down"
    """To whole steps; rounded up, as transformers does it, a run of one step learns nothing."""
    weight_decay: NotNegative = 0.01
    """Of AdamW."""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    max_grad_norm: AboveZero = 1.0
    """A longer gradient is cut to this norm."""
    full: bool = False
    """Tune all weights instead of adapters; [training.lora] is not read then."""
    lora: Lora = Lora()
    """The adapters."""
    sentinel: Sentinel = Sentinel()
    """When tuning stops by itself."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Of the prompts, held out: the sentinel watches them, and the best checkpoint is chosen on them."""

    @model_serializer(mode="wrap")
    def _as_ever(self, serialized: Any) -> dict[str, Any]:
        """Without the defaults of keys that the fingerprints of earlier versions did not have."""
        later = {"sft_on": "completion", "warmup_rounding": "down"}
        return {name: value for name, value in serialized(self).items() if value != later.get(name, ...)}
