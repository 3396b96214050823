"""What a model's files say without its weights: its config, and where its completions end and its scores are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from croco.config.models import Model
from croco.errors import UserError
from croco.storage.hashing import local_model


def load_config(section: Model, key: str) -> Any:
    """The config of a recipe's model; raises UserError naming the key."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            local_model(section.model, f"{key}.model") or section.model,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{key}.model = '{section.model}' does not load: {reason}") from None


def generation_config(section: Model) -> Any:
    """The model's generation config, or None where it has none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(
            local_model(section.model) or section.model, revision=section.revision
        )
    except OSError:
        return None


def read_part(ids: Sequence[int], pad: int | None) -> list[int]:
    """The ids up to the last that is no padding, where transformers reads a score: vLLM reads it at the last of all."""
    end = next((at for at in range(len(ids), 1, -1) if ids[at - 1] != pad), 1)
    return list(ids[:end])
