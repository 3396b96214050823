"""What sections of a recipe must agree on. Each check raises ValueError that names the key; `check` runs them all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from croco.config.arms import ENGLISH
from croco.config.rules import check_groups
from croco.config.study import BASE, GROUPS
from croco.errors import UserError
from croco.storage.hashing import LAB_LANGUAGES

if TYPE_CHECKING:
    from croco.config.arms import Arm
    from croco.config.evaluation import Source
    from croco.config.recipe import Recipe


def check(recipe: Recipe) -> None:
    """Raise ValueError for the first disagreement."""
    _check_nothing_of_the_lab(recipe)
    _check_arms(recipe)
    if recipe.study:
        _check_study(recipe)
    _check_euroeval(recipe)
    _check_arena(recipe)
    _check_lab_languages(recipe)
    if recipe.translate and not set(recipe.run.languages) - {recipe.translate.source}:
        raise ValueError(
            f"translate.source = '{recipe.translate.source}' is the only language of run.languages"
        )
    _check_test_prompts(recipe)


def _check_nothing_of_the_lab(recipe: Recipe) -> None:
    """A policy of one's own is not tuned on the lab's prompts, by the lab's reward model, unless the recipe says so."""
    in_the_lab = recipe.prompts.source in LAB_LANGUAGES and "source" in recipe.prompts.model_fields_set
    if recipe.policy.model.startswith("lab:") or in_the_lab:
        return
    for section, key in (("prompts", "source"), ("reward", "model"), ("evaluation", "source")):
        if not {key, "function"} & getattr(recipe, section).model_fields_set:
            raise ValueError(
                f"{section}.{key} is missing: policy.model = '{recipe.policy.model}' is not the lab's, and without it "
                f"[{section}] would be the lab's toy"
            )


def has_splits(source: str) -> bool:
    """Whether a source has splits: the lab, the hub, and a folder that `save_to_disk` made of several."""
    saved = os.path.join(os.path.expanduser(source), "dataset_dict.json")
    return source in LAB_LANGUAGES or source.startswith("hf:") or os.path.isfile(saved)


def _same_rows(tuning: Source, test: Source) -> bool:
    """Whether two sections read the same rows of the same source."""
    rows = [section.of(None) for section in (tuning, test)]
    if not has_splits(str(tuning.source)):
        rows = [{name: of[name] for name in ("source", "data_files")} for of in rows]
    return rows[0] == rows[1]


def _check_arms(recipe: Recipe) -> None:
    for name, arm in recipe.arms.items():
        for code in arm.languages:
            if code not in recipe.run.languages:
                known = ", ".join(recipe.run.languages)
                raise ValueError(f"arms.{name}.languages: '{code}' is not tuned, expected of {known}")
        tuned = recipe.languages_of(arm)
        for group, codes in arm.pool.items() if isinstance(arm.pool, dict) else ():
            for code in codes:
                if code not in tuned:
                    raise ValueError(
                        f"arms.{name}.pool.{group}: '{code}' is not tuned, expected of {', '.join(tuned)}"
                    )
        try:
            check_groups(arm.pool, tuned)
        except UserError as error:
            raise ValueError(f"arms.{name}.pool: {error}") from None
        shared = not arm.start and not arm.sampler
        if shared and arm.completions and arm.completions > recipe.sampling.completions:
            raise ValueError(
                f"arms.{name}.completions = {arm.completions}, but only sampling.completions = "
                f"{recipe.sampling.completions} are sampled"
            )
        if arm.sampler and recipe.runtime.engines.sample == "server":
            raise ValueError(
                f"arms.{name}.sampler is another model than the one that runtime.servers.sample serves: expected "
                f"runtime.engines.sample = 'transformers' or 'vllm'"
            )
        if arm.training.full and recipe.policy.dtype == "float16":
            raise ValueError(
                f"arms.{name}.training.full tunes all weights, whose gradients overflow in policy.dtype = 'float16': "
                f"expected 'bfloat16' or 'float32', or adapters"
            )
        _check_start(recipe, name, arm)
        _check_scorer(recipe, name, arm)
    _check_cycles(recipe)


def _check_start(recipe: Recipe, name: str, arm: Arm) -> None:
    if arm.start is None:
        return
    other = _known(recipe, f"arms.{name}.start", arm.start)
    for key in ("rank", "alpha", "targets"):
        if getattr(other.training.lora, key) != getattr(arm.training.lora, key):
            raise ValueError(
                f"arms.{name} goes on training the adapter of '{arm.start}': expected the same training.lora.{key}"
            )


def _check_scorer(recipe: Recipe, name: str, arm: Arm) -> None:
    if arm.scorer == "verified" and recipe.prompts.source not in LAB_LANGUAGES:
        raise ValueError(
            f"arms.{name}.scorer = 'verified' is the lab's program: expected prompts.source = 'lab'"
        )
    if arm.scorer == "alignment":
        if recipe.alignment is None:
            raise ValueError(f"arms.{name}.scorer = 'alignment' needs [alignment] with a translation model")
        if ENGLISH not in recipe.run.languages or set(recipe.languages_of(arm)) == {ENGLISH}:
            raise ValueError(
                f"arms.{name}.scorer = 'alignment' sets completions of other languages beside English ones: "
                f"expected '{ENGLISH}' and others in run.languages"
            )
    if arm.implicit is not None:
        other = _known(recipe, f"arms.{name}.implicit.arm", arm.implicit.arm)
        if set(recipe.languages_of(other)) != {ENGLISH} or other.training.method != "dpo" or other.start:
            raise ValueError(
                f"arms.{name}.implicit.arm = '{arm.implicit.arm}', expected an arm that is tuned by DPO from the base "
                f'on languages = ["{ENGLISH}"]'
            )
        if "{language}" not in arm.implicit.instruction:
            raise ValueError(f"arms.{name}.implicit.instruction does not name its {{language}}")


def _check_cycles(recipe: Recipe) -> None:
    for name in recipe.arms:
        path, todo = [name], [name]
        while todo:
            arm = recipe.arms[todo.pop()]
            for before in (arm.start, arm.implicit.arm if arm.implicit else None):
                if before == name:
                    raise ValueError(f"arms.{name} starts from itself, by way of {' and '.join(path)}")
                if before and before not in path:
                    path.append(before)
                    todo.append(before)


def _known(recipe: Recipe, key: str, name: str) -> Arm:
    if name not in recipe.arms:
        raise ValueError(f"{key} = '{name}', expected an arm of this recipe: one of {', '.join(recipe.arms)}")
    return recipe.arms[name]


def _check_study(recipe: Recipe) -> None:
    """A claim must be about arms, languages and temperatures that the recipe has."""
    assert recipe.study is not None
    arms, run = (BASE, *recipe.evaluated_arms), recipe.run
    if recipe.study.transfer and recipe.prompts.source not in LAB_LANGUAGES:
        raise ValueError("study.transfer needs verified completions: expected prompts.source = 'lab'")
    for name in recipe.study.settings:
        if name not in (*recipe.arms, *recipe.sweep):
            raise ValueError(f"study.settings.{name}: no such arm and no such sweep")
    for name, claim in recipe.study.claims.items():
        for number, test in enumerate(claim.tests, start=1):
            where = f"study.claims.{name}, test {number}"
            known = tuple(recipe.sweep) if test.at_equal else arms
            for arm in (test.arm, test.than, *(test.beyond or ())):
                if arm not in known:
                    what = "is no sweep" if test.at_equal else "is not evaluated"
                    raise ValueError(f"{where}: '{arm}' {what}, expected one of {', '.join(known) or 'none'}")
            if test.at_equal == "kl" and not recipe.evaluation.kl:
                raise ValueError(f"{where}: at_equal = 'kl' needs evaluation.kl = true")
            for scope in test.on:
                if scope not in (*GROUPS, *run.evaluated):
                    raise ValueError(
                        f"{where}: on = '{scope}', expected a group ({', '.join(GROUPS)}) or a language"
                    )
            for temperature in test.temperatures:
                if temperature not in recipe.evaluation.temperatures:
                    raise ValueError(f"{where}: temperature {temperature} is not in evaluation.temperatures")


def _check_euroeval(recipe: Recipe) -> None:
    if recipe.euroeval is None:
        return
    evaluated, arms = recipe.run.evaluated, ("base", *recipe.evaluated_arms)
    for code in recipe.euroeval.datasets or ():
        if code not in evaluated:
            raise ValueError(f"euroeval.datasets.{code}: not evaluated, expected of {', '.join(evaluated)}")
    if not any(recipe.euroeval.datasets_of(code) for code in evaluated):
        raise ValueError(f"euroeval has no dataset in {', '.join(evaluated)}")
    for arm in recipe.runtime.euroeval.urls:
        if arm not in arms:
            raise ValueError(f"runtime.euroeval.urls.{arm}: no such arm, expected of {', '.join(arms)}")


def _check_arena(recipe: Recipe) -> None:
    arena = recipe.arena
    if arena is None:
        return
    for code in arena.languages:
        if code not in recipe.run.evaluated:
            known = ", ".join(recipe.run.evaluated)
            raise ValueError(f"arena.languages: '{code}' is not evaluated, expected of {known}")
    source = arena.source or recipe.evaluation.source
    if arena.judge == "lab" and source not in LAB_LANGUAGES:
        raise ValueError(f"arena.judge = 'lab' judges prompts of the lab, and they are of '{source}'")
    if arena.judge == "model" and recipe.judge is None:
        raise ValueError("arena.judge = 'model' is the model of [judge], which is missing")
    if arena.source and _same_rows(recipe.prompts, arena):
        raise ValueError(f"arena.source is '{arena.source}', the prompts tuned on: expected others")


def _check_lab_languages(recipe: Recipe) -> None:
    read = {"prompts": recipe.prompts_languages, "evaluation": recipe.evaluation_languages}
    for key, codes in (read | ({"arena": recipe.arena_languages} if recipe.arena else {})).items():
        source = getattr(recipe, key).source
        known = LAB_LANGUAGES.get(source)
        if known and (unknown := set(codes) - set(known)):
            raise ValueError(
                f"{key}.source = '{source}' has no prompts in '{min(unknown)}', expected of {', '.join(known)}"
            )


def _check_test_prompts(recipe: Recipe) -> None:
    tuning, test = recipe.prompts, recipe.evaluation
    if test.kl and 1.0 not in test.temperatures:
        raise ValueError(
            "evaluation.kl is of completions at temperature 1, which evaluation.temperatures lacks"
        )
    if _same_rows(tuning, test):
        raise ValueError(f"evaluation.source is '{test.source}', the prompts tuned on: expected others")
    for key, section in (("prompts", tuning), ("evaluation", test)):
        default = type(section).model_fields["split"].default
        if section.split != default and not has_splits(section.source):
            raise ValueError(
                f"{key}.split is for the lab and for hub datasets, and '{section.source}' is a file"
            )
