"""What a model's files say without its weights: its config, and where its completions end and its scores are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from croco.errors import UserError
from croco.identity import local_model
from croco.recipe_models import Model

UNKNOWN_CONTEXT = 2**30  # tokens: of ALiBi, recurrent layers and the like


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


def context_of(config: Any) -> int:
    """The longest sequence in tokens that a model was made for, UNKNOWN_CONTEXT where its config does not say.

    Positions of the type "dynamic" stretch what the config says by their factor.
    """
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    found = [getattr(text, name, None) for name in names]
    positions = next((one for one in found if isinstance(one, int) and one > 0), UNKNOWN_CONTEXT)
    rope = getattr(text, "rope_parameters", None) or {}
    stretched = rope.get("factor", 1.0) if rope.get("rope_type") == "dynamic" else 1.0
    return int(positions * stretched)


def read_part(ids: Sequence[int], pad: int | None) -> list[int]:
    """The ids up to the last that is no padding, where transformers reads a score: vLLM reads it at the last of all."""
    end = next((at for at in range(len(ids), 1, -1) if ids[at - 1] != pad), 1)
    return list(ids[:end])
