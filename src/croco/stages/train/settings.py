"""What a tuning run is made of: plain frozen records, no recipe and no torch.

Everything here changes the science. How the work is laid out on a machine (tokens per micro-batch,
checkpointing of activations) is an argument of the functions instead and changes nothing but speed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from croco.stages.train.early_stopping import SentinelSettings

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters: rank, scale (alpha / rank), dropout on their input, and the linear layers that get
    one.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: tuple[str, ...] = PROJECTIONS


@dataclass(frozen=True)
class TrainSettings:
    """`[training]` of a recipe. `batch_pairs` is the effective batch of one optimizer step, over all devices.

    `max_tokens` bounds prompt + completion, the end token included; a longer pair is left out and counted, or with
    `over_length` "truncate" its completions lose their ends. `beta`, `loss` (with `label_smoothing` for "robust" and
    `simpo_gamma` for "simpo") and `nll_weight` are read by method "dpo" only; method "sft" trains the likelihood of the
    chosen completions.
    """

    method: str = "dpo"
    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    nll_weight: float = 0.0
    learning_rate: float = 5e-6
    epochs: int = 1
    updates: int | None = None
    batch_pairs: int = 64
    max_tokens: int = 4096
    over_length: str = "drop"
    warmup_ratio: float = 0.05
    weight_decay: float = 0.01
    scheduler: str = "cosine"
    max_grad_norm: float = 1.0
    validation_fraction: float = 0.02
    full: bool = False  # all weights are tuned, and `lora` is not read
    lora: LoraSettings = field(default_factory=LoraSettings)
    sentinel: SentinelSettings = field(default_factory=SentinelSettings)

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> "TrainSettings":
        """The settings of a resolved `[training]` section (its lists may be tuples or lists)."""
        lora = LoraSettings(**{**section["lora"], "targets": tuple(section["lora"]["targets"])})
        sentinel = SentinelSettings(**section.get("sentinel", {}))
        return cls(**{**section, "lora": lora, "sentinel": sentinel})
