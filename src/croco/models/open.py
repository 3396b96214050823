"""Engines that sample, score and judge; `protocols` is what they promise. Opening one imports its library."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from croco.errors import UserError

if TYPE_CHECKING:
    from croco.config.models import Causal, Policy, RewardPart
    from croco.config.recipe import Recipe
    from croco.config.runtime import Runtime
    from croco.models.protocols import Judge, Sampler, Scorer


def check(recipe: Recipe) -> None:
    """Raise UserError for an engine or device that the recipe names and this machine does not have."""
    if recipe.runtime.device not in ("auto", "cpu"):
        from croco.models.loading import pick_device

        pick_device(recipe.runtime.device)
    for role in type(recipe.runtime.engines).model_fields:
        if engine_of(recipe.runtime, role)[0] == "vllm":
            from croco.models import vllm_server

            try:
                vllm_server.check(recipe.runtime.vllm.python, "runtime.vllm.python")
            except UserError as error:
                raise UserError(f"runtime.engines.{role} = 'vllm': {error}") from None


def engine_of(runtime: Runtime, role: str) -> tuple[str, str]:
    """The engine of a role, and why that one."""
    asked: str = getattr(runtime.engines, role)
    if asked != "auto":
        return asked, "the recipe says so"
    if runtime.device == "cpu" or ":" in runtime.device:  # vLLM takes the first GPU, or those it is shown
        return "transformers", f"the device is {runtime.device}"
    if runtime.vllm.python is None and find_spec("vllm") is None:
        return "transformers", "vLLM is not installed"
    from croco.models.loading import pick_device

    if pick_device(runtime.device).type != "cuda":
        return "transformers", "there is no GPU"
    return "vllm", "there is a GPU, and vLLM"


def engines(recipe: Recipe) -> Iterator[str]:
    """For a person: each engine, the roles of the recipe that run on it, and why."""
    chosen: dict[tuple[str, str], list[str]] = {}
    for role in type(recipe.runtime.engines).model_fields:
        if getattr(recipe, role, True) is not None:  # without [translate] or [judge] there is no such role
            chosen.setdefault(engine_of(recipe.runtime, role), []).append(role)
    for (engine, why), roles in chosen.items():
        yield f"{engine} for {', '.join(roles)} ({why})"


def release() -> None:
    """Give back the memory that an engine or a stage has held here: for the next one, or another process."""
    if "croco.models.vllm" in sys.modules:
        sys.modules["croco.models.vllm"].release()
    if "torch" in sys.modules:
        from croco.models.memory import give_back

        give_back()


def open_sampler(
    role: str, causal: Causal, runtime: Runtime, seed: int, replica: int = 0, adapter: Path | None = None
) -> tuple[Sampler, Any]:
    """A causal model (with an adapter, if given) on the engine of a role, and its tokenizer, None where the sampler
    takes messages. `seed` and `replica` make the engine's own seed where completions have none."""
    engine, _ = engine_of(runtime, role)
    if engine != "server":
        causal, adapter = with_tuned(causal, adapter)
    if engine == "vllm":
        from croco.models.vllm import open_policy

        return open_policy(causal, runtime.vllm.of(role), seed, replica, adapter)
    if engine == "server":
        from croco.models import openai_server

        return openai_server.sampler(getattr(runtime.servers, role), role, causal, adapter)
    from croco.models.loading import load_causal
    from croco.models.transformers import HFSampler

    model, tokenizer = load_causal(causal, adapter, runtime.device)
    return HFSampler(model, tokenizer, runtime.token_budget, name=causal.model), tokenizer


def tuned_weights(folder: Path) -> Path:
    """What a finished stage `train` made: its adapter, or its model where all weights were tuned."""
    return folder / "model" if _is_whole(folder / "model") else folder / "adapter"


def with_tuned(causal: Causal, weights: Path | None) -> tuple[Causal, Path | None]:
    """The model and the adapter to open: weights that were all tuned are a model of their own."""
    if weights is None or not _is_whole(weights):
        return causal, weights
    return causal.model_copy(update={"model": str(weights), "revision": None}), None


POLICY = "policy.json"  # beside the adapter that `croco train FILE` makes


def policy_of(folder: Path) -> tuple[Policy, Path | None]:
    """The policy in a folder of a model or adapter, also as `croco train` leaves them, and the adapter; raises
    UserError for another folder."""
    from pydantic import ValidationError

    from croco.config.models import Policy
    from croco.storage.files import read_json
    from croco.storage.hashing import gguf_file

    if gguf_file(str(folder), str(folder)) is not None:
        return Policy(model=str(folder)), None
    for place in (folder, folder / "adapter", folder / "model"):
        if _is_whole(place):
            return Policy(model=str(place)), None
        if not (place / "adapter_config.json").is_file():
            continue
        source = folder / POLICY if (folder / POLICY).is_file() else place / "adapter_config.json"
        values = read_json(source)
        values = values if isinstance(values, dict) else {}
        if source.name != POLICY:
            values = {"model": values.get("base_model_name_or_path"), "revision": values.get("revision")}
        try:
            return Policy.model_validate(values | {"trust_remote_code": False}), place
        except ValidationError:
            raise UserError(
                f"{source} names no base model, or says more than a policy: expected one"
            ) from None
    raise UserError(
        f"{folder} holds no recipe.json, config.json or adapter_config.json: expected the folder of a run, a model or "
        f"an adapter"
    )


def _is_whole(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def open_judge(judge: Causal, runtime: Runtime, replica: int = 0) -> Judge:
    """The judge on the engine of the role "judge"."""
    from croco.models.judge import SamplerJudge

    temperature = getattr(judge, "temperature", 0.0)
    return SamplerJudge(*open_sampler("judge", judge, runtime, 0, replica), temperature)


def open_scorer(reward: RewardPart, runtime: Runtime, replica: int = 0) -> tuple[Scorer, Any]:
    """The reward model on the engine of the role "score", and its tokenizer."""
    engine, _ = engine_of(runtime, "score")
    if engine == "vllm":
        from croco.models.vllm import open_reward

        return open_reward(reward, runtime.vllm.of("score"))
    if engine == "server":
        from croco.models import openai_scorer

        return openai_scorer.scorer(runtime.servers.score, reward)
    from croco.models.loading import load_reward
    from croco.models.transformers import HFScorer

    model, tokenizer = load_reward(
        reward.model, reward.revision, reward.dtype, runtime.device, reward.trust_remote_code
    )
    return HFScorer(model, tokenizer, runtime.token_budget, name=reward.model), tokenizer
