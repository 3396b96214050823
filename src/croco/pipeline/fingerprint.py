"""What enters each stage's fingerprint: the resolved values of the recipe that change its tables, and only those.

Models and files enter by their content (`hashing.py`); `[runtime]` and library versions never do."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from croco.config.arms import Alignment, Origin
from croco.config.checks import has_splits
from croco.config.evaluation import VERSION as EUROEVAL_VERSION
from croco.config.evaluation import Source
from croco.config.models import Causal, Judge, Model, Policy, Reward, RewardPart
from croco.config.recipe import Prompts, Recipe
from croco.errors import UserError
from croco.lab import WORLDS
from croco.pipeline.arms import arm_of, num_completions, num_rounds_before, num_scored, sampled_languages
from croco.pipeline.node import Given, Settings
from croco.storage.files import read_json
from croco.storage.hashing import file_identity, folder_identity, function_file, local_model, model_identity
from croco.storage.rows import files_of, is_saved_dataset
from croco.storage.seeds import digest as seed_digest


def prompts_settings(recipe: Recipe, key: str, languages: Sequence[str] | None = None) -> Settings:
    """What [prompts], [evaluation] or [arena] reads: in its own languages, if none are given."""
    section: Source = getattr(recipe, key)
    languages = getattr(recipe, f"{key}_languages") if languages is None else languages
    assert section.source is not None
    settings: Settings = {"languages": Given(tuple(languages), sorted(languages)), "limit": section.limit}
    if isinstance(section, Prompts) and section.order == "seed":
        settings["order"] = ["seed", recipe.run.seed]
    settings |= section.model_dump(include={"columns", "language", "system", "turns"}, exclude_defaults=True)
    given = Source(**section.model_dump(include=set(Source.model_fields)))
    if section.source in WORLDS:
        return settings | {"source": Given(given, f"lab {WORLDS[section.source]}"), "split": section.split}
    settings |= {"id_column": section.id_column, "language_column": section.language_column}
    codes = languages if section.by_language else [None]
    identities = {code: _source_identity(section.of(code), f"{key}.source") for code in codes}
    settings["source"] = Given(given, identities if section.by_language else identities[None])
    if has_splits(section.source):
        named = section.of(None)
        settings["split"] = section.split
        settings |= {name: named[name] for name in ("config", "revision") if named[name] is not None}
    return settings


def _source_identity(of: Mapping[str, Any], key: str) -> str | list[str]:
    """What a file or folder holds, wherever it lies; a data set of the hub by its name and files."""
    source = of["source"]
    folder = Path(os.path.expanduser(source.removeprefix("hf:")))
    if is_saved_dataset(source) or (source.startswith("hf:") and os.path.isdir(folder)):
        return f"hf:{folder_identity(folder.resolve())}"
    if source.startswith("hf:"):
        return [source, *of["data_files"]] if of["data_files"] else source
    identities = [file_identity(str(path), key) for path in files_of(source, of["data_files"], key)]
    return identities[0] if len(identities) == 1 else identities


def test_prompts_settings(recipe: Recipe, key: str) -> Settings:
    """As `prompts_settings`; raises UserError when the file is the one tuned on, under whatever name."""
    settings = prompts_settings(recipe, key)
    both = (getattr(recipe, key).source, recipe.prompts.source)
    if not any(has_splits(source) for source in both):
        tuning = prompts_settings(recipe, "prompts", getattr(recipe, f"{key}_languages"))
        if settings["source"].identity == tuning["source"].identity:
            raise UserError(
                f"{key}.source = '{both[0]}' has the content of prompts.source = '{both[1]}', the prompts tuned on: "
                f"expected others"
            )
    return settings


def translate_settings(recipe: Recipe, languages: Sequence[str]) -> Settings:
    section = recipe.translate
    assert section is not None
    identity = given_model(section, "translate").identity
    settings = section.model_dump(mode="json", exclude={"trust_remote_code", "evaluation", "revision"})
    if not section.chat_template_kwargs:
        del settings["chat_template_kwargs"]
    return settings | {
        "model": Given(section, identity["model"]),
        "chat_template": identity["chat_template"],
        "checks": sorted(section.checks),
        "languages": sorted(languages),
    }


def given_model(section: Model, key: str, **more: Any) -> Given:
    """A section that names a model for a function to open; the fingerprint holds what its files are, and `more`."""
    identity = more | {"dtype": section.dtype}
    identity["model"] = model_identity(section.model, section.revision, f"{key}.model")
    if isinstance(section, Causal):
        template = section.chat_template
        identity["chat_template"] = file_identity(template, f"{key}.chat_template") if template else None
        if section.chat_template_kwargs:
            identity["chat_template_kwargs"] = dict(section.chat_template_kwargs)
    return Given(section, identity)


def given_policy(policy: Policy, languages: Sequence[str], key: str = "policy") -> Given:
    """A policy that is prompted in these languages."""
    instruction = {code: text for code, text in sorted(policy.instruction.items()) if code in languages}
    return given_model(policy.model_copy(update={"instruction": instruction}), key, instruction=instruction)


def given_reward(reward: Reward, key: str = "reward") -> Given:
    first, *others = (_reward_part(part, key) for part in reward.parts)
    return Given(reward, first | ({"also": others} if others else {}))


def _reward_part(part: RewardPart, key: str) -> Settings:
    weight: Settings = {} if part.weight == 1 else {"weight": part.weight}
    if part.function is not None:
        file = file_identity(str(function_file(part.function)), f"{key}.function")
        return {"function": part.function.rpartition(":")[2], "source": file} | weight
    given: Settings = given_model(part, key, max_tokens=part.max_tokens).identity
    check_one_logit(part.model, key)
    return given | weight


def check_one_logit(model: str, key: str = "reward") -> None:
    """Raise UserError when a local reward model's config does not say one logit (without one it has two)."""
    folder = local_model(model, f"{key}.model")
    if folder is not None:
        config = read_json(folder / "config.json")
        config = config if isinstance(config, dict) else {}
        labels = config.get("id2label", config.get("num_labels", 2))
        labels = len(labels) if isinstance(labels, dict | list) else labels
        if labels != 1:
            causal = any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ())
            fault = "is a causal language model" if causal else f"has {labels} logits"
            raise UserError(f"{key}.model = '{model}' {fault}, expected a sequence classifier with one logit")


def sample_settings(recipe: Recipe, arm: str | None) -> Settings:
    sampling = recipe.sampling.model_dump(mode="json")
    if arm is None:
        shared = given_policy(recipe.policy, recipe.run.languages)
        return {"policy": shared, "sampling": sampling, "seed": recipe.run.seed}
    languages, section = sampled_languages(recipe, arm), arm_of(recipe, arm)
    policy, key = recipe.policy, "policy"
    if section.sampler:
        policy = Policy(**section.sampler.model_dump(), instruction=policy.instruction)
        key = f"arms.{arm}.sampler"
    rounds = num_rounds_before(recipe, arm)
    tokenizer = Policy(**recipe.policy.model_dump(include={"model", "revision", "trust_remote_code"}))
    return {
        "policy": given_policy(policy, languages, key),
        "ids_of": Given(tokenizer, model_identity(tokenizer.model, tokenizer.revision, "policy.model")),
        "sampling": sampling | {"completions": num_completions(recipe, arm)},
        # the noise of an earlier round is in what it was tuned on: another for each
        "seed": seed_digest("round", recipe.run.seed, rounds) if rounds else recipe.run.seed,
        "languages": sorted(languages),
        "part": section.part if section.start else None,
    }


def score_settings(recipe: Recipe, arm: str | None) -> Settings:
    section = arm_of(recipe, arm) if arm else Origin()
    policy = given_policy(recipe.policy, recipe.run.languages)
    match section.scorer:
        case "reward":
            own: Settings = {"reward": given_reward(section.reward or recipe.reward)}
        case "likelihood" | "likelihood-sum":
            own = {"policy": policy}
        case "verified":
            own = {"world": WORLDS[recipe.prompts.source]}
        case "implicit":
            assert section.implicit is not None
            own = {"policy": policy, "instruction": section.implicit.instruction}
        case "alignment":
            own = {"alignment": given_alignment(recipe)}
        case _:
            own = {"seed": recipe.run.seed}
    first = num_scored(recipe, arm)
    return {"scorer": section.scorer} | own | ({"completions": first} if first else {})


def given_alignment(recipe: Recipe) -> Given:
    section = recipe.alignment
    assert isinstance(section, Alignment)  # where an arm's scorer is "alignment"
    codes = {code: section.codes.get(code) for code in sorted(recipe.run.languages)}
    more = {"codes": codes, "targets": section.targets, "max_tokens": section.max_tokens}
    return given_model(section, "alignment", **more)


def pair_settings(recipe: Recipe, arm: str | None) -> Settings:
    section = arm_of(recipe, arm)
    # how completions and scores came about is in the stages that made them
    rules = section.model_dump(mode="json", exclude={*Origin.model_fields, "training"})
    limit = section.training.max_tokens if section.guards.too_long != "off" else None
    rules["guards"]["max_tokens"] = limit
    if section.languages:
        rules["languages"] = sorted(section.languages)
    if section.completions:
        rules["completions"] = section.completions
    if section.part:
        rules["part"] = section.part
    if section.guards.wrong_language != "off":
        # a text in the wrong language may be in any of these
        rules["evaluated"] = sorted(recipe.run.evaluated)
    return rules | {"seed": recipe.run.seed}


def train_settings(recipe: Recipe, arm: str | None) -> Settings:
    section = arm_of(recipe, arm)
    settings = {
        "policy": given_policy(recipe.policy, recipe.run.languages),
        "training": section.training.model_dump(mode="json"),
        "seed": recipe.run.seed,
    }
    if recipe.policy.quantization and not section.training.full:
        settings["quantization"] = recipe.policy.quantization
    return settings | ({"reference": section.reference} if section.start else {})


def evaluate_settings(recipe: Recipe, arm: str | None) -> Settings:
    evaluation = recipe.evaluation
    more = evaluation.base_temperatures if arm == "base" else ()
    reward = recipe.evaluation_reward
    return {
        "policy": given_policy(recipe.policy, recipe.run.evaluated),
        "temperatures": sorted({*evaluation.temperatures, *more}),
        "samples": evaluation.samples,
        "max_new_tokens": evaluation.max_new_tokens,
        "reward": given_reward(reward, "evaluation.reward" if evaluation.reward else "reward")
        if reward
        else None,
        "seed": recipe.run.seed,
        **({"kl": True} if evaluation.kl and arm != "base" else {}),
    }


def euroeval_settings(recipe: Recipe, arm: str | None) -> Settings:
    """What EuroEval is asked; the instruction of [policy] is not part of its prompts."""
    section = recipe.euroeval
    assert section is not None
    return section.model_dump(mode="json", exclude={"datasets", "local"}) | {
        "version": EUROEVAL_VERSION,
        "policy": given_policy(recipe.policy, ()),
        "datasets": {code: sorted(section.datasets_of(code)) for code in sorted(recipe.run.evaluated)},
        "local": Given(section.local, local_datasets(section.local)) if section.local else None,
    }


def local_datasets(name: str) -> str:
    """The identity of a folder with EuroEval datasets; raises UserError when it has none."""
    folder = Path(os.path.expanduser(name))
    if not (folder / "custom_datasets.py").is_file():
        raise UserError(f"euroeval.local = '{name}': expected a folder with custom_datasets.py")
    return folder_identity(folder.resolve())


def arena_sample_settings(recipe: Recipe, arm: str | None) -> Settings:
    assert recipe.arena is not None
    settings = {
        "policy": given_policy(recipe.policy, recipe.arena_languages),
        "max_new_tokens": recipe.arena.max_new_tokens or recipe.evaluation.max_new_tokens,
        "languages": sorted(recipe.arena_languages),
        "limit": recipe.arena.limit,
    }
    return settings | ({"temperature": recipe.arena.temperature} if recipe.arena.temperature else {})


def arena_settings(recipe: Recipe, arm: str | None) -> Settings:
    assert recipe.arena is not None
    lab = recipe.arena.judge == "lab"
    world = WORLDS.get(recipe.arena.source or recipe.evaluation.source or "")
    settings: Settings = {
        "judge": Given("lab", f"lab {world}") if lab else given_judge(recipe.judge),
        "languages": sorted(recipe.arena_languages),
        "evaluated": sorted(recipe.run.evaluated),  # completions are told apart among these
        "limit": recipe.arena.limit,
    }
    return settings | ({"orders": recipe.arena.orders} if recipe.arena.orders != "both" else {})


def given_judge(judge: Judge | None) -> Given:
    assert judge is not None  # the recipe's checks saw to it
    more: Settings = {"temperature": judge.temperature} if judge.temperature else {}
    if judge.labels != "words":
        more["labels"] = judge.labels
    return given_model(judge, "judge", max_new_tokens=judge.max_new_tokens, **more)


def results_settings(recipe: Recipe, arm: str | None) -> Settings:
    groups = recipe.run.model_dump(
        mode="json", include={"languages", "low_resource_languages", "held_out_languages", "seed"}
    )
    drawn = (
        {"arena_temperature": recipe.arena.temperature} if recipe.arena and recipe.arena.temperature else {}
    )
    return groups | {"bootstrap": recipe.evaluation.bootstrap} | drawn
