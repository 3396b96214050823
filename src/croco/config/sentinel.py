"""`[training.sentinel]` of the recipe: when tuning stops by itself, which decides what comes out, so it is science."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from croco.config.runtime import Positive, Section


class Sentinel(Section):
    """Bounds in nats per token, on held-out pairs and on three training steps in a row; past one, tuning stops."""

    enabled: bool = True
    evaluations: Positive = (
        4  # of the held-out pairs, each with a checkpoint; the best of them becomes the policy
    )
    max_chosen_drop: Annotated[float, Field(gt=0)] = (
        1.0  # of the chosen's log-probability under the reference's
    )
    max_kl: Annotated[float, Field(gt=0)] = 1.5  # of the policy from the reference
    max_grad_norm_factor: Annotated[float, Field(gt=1)] = 100.0  # times that of the first steps
    # every pair right within `early_steps`, while language, length or finish reason tells them apart with this AUC
    shortcut_auc: Annotated[float, Field(ge=0.5, le=1)] = 0.95  # 1 never stops
    early_steps: Annotated[int, Field(ge=0)] = 20
