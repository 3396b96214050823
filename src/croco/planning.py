"""`croco plan`: what would run, what is complete or stale and why, and what it may cost at most.

Upper bounds from the recipe: every completion as long as allowed. Loads no torch and runs nothing; prompts of files and
of the lab are read to be counted, those of a hub dataset are not.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from croco import pipeline, store
from croco.executor import described
from croco.prompts import load as prompts_load
from croco.recipe import Evaluation, Prompts, Recipe
from croco.recipe_arena import Arena
from croco.stage import Node
from croco.standing import Status

# in a table a token is its id (4 bytes) and about as much text, before compression
TOKEN_BYTES = 8
ROW_BYTES = 200
MISFIT = "DOES NOT FIT"  # at most; what `croco doctor` ends on


def describe(recipe: Recipe) -> Iterator[str]:
    """Lines for a person: the stages, then counts, tokens and disk."""
    planned = pipeline.plan(recipe)
    yield f"{recipe.folder}"
    for node, status in planned:
        yield f"  {node.title:<28} {_standing(node, status)}"
        for change in status.changes:
            yield f"      {change}"
    yield f"workers: {described(recipe.runtime)}"
    yield from cost(recipe, rates(recipe))


def _standing(node: Node, status: Status) -> str:
    if status.kind == "complete":
        found = store.read_json(node.folder / "stage.json")
        return f"complete: {pipeline.counted(node, found)}{found['seconds']:.1f} s"
    if status.kind == "unfinished":
        return f"unfinished ({len(store.shards(node.folder))} shards there): would go on"
    return {"missing": "would run", "stale": "stale, would need --rebuild:"}[status.kind]


def rates(recipe: Recipe) -> dict[str, float]:
    """What stages of this run have recorded: tokens a second of "sample", completions a second of "score"."""
    found = {}
    for stage, fact in (("sample", "tokens_per_second"), ("score", "completions_per_second")):
        path = recipe.folder / stage / "stage.json"
        rate = store.read_json(path)["facts"].get(fact) if path.exists() else None
        if rate:
            found[stage] = float(rate)
    return found


def cost(recipe: Recipe, rates: Mapping[str, float]) -> Iterator[str]:
    """Counts of prompts × languages × completions, and what they may take at most; hours where a rate is known."""
    tuning = _num_prompts(recipe.prompts, "prompts", recipe.prompts_languages)
    test = _num_prompts(recipe.evaluation, "evaluation", recipe.evaluation_languages)
    if recipe.translate and tuning is not None:
        yield _translations("translate", tuning, recipe.translate.source, recipe.run.languages)
        tuning *= len(recipe.run.languages)
    if recipe.translate and recipe.translate.evaluation and test is not None:
        yield _translations("eval-translate", test, recipe.translate.source, recipe.run.evaluated)
        test *= len(recipe.run.evaluated)
    tokens = rows = scored = 0
    if tuning is not None:
        completions = tuning * recipe.sampling.completions
        rows = scored = completions
        tokens = completions * recipe.sampling.max_new_tokens
        yield (
            f"sample: {tuning:,} prompts in {len(recipe.run.languages)} languages × {recipe.sampling.completions} "
            f"completions = {completions:,}, at most {tokens:,} tokens"
        )
    if test is not None:
        evaluation = recipe.evaluation
        tuned = [1 if t == 0 else evaluation.samples for t in set(evaluation.temperatures)]
        base = [
            1 if t == 0 else evaluation.samples
            for t in {*evaluation.temperatures, *evaluation.base_temperatures}
        ]
        completions = test * (sum(base) + len(recipe.arms) * sum(tuned))
        rows, tokens = rows + completions, tokens + completions * evaluation.max_new_tokens
        yield (
            f"evaluate: {test:,} prompts in {len(recipe.run.evaluated)} languages, {len(recipe.arms)} arms and "
            f"the base: {completions:,} completions, at most {completions * evaluation.max_new_tokens:,} tokens"
        )
    if recipe.arena is not None:
        yield _comparisons(recipe, test)
    if tuning is None or test is None:
        yield "prompts of a hub dataset without a limit are not counted here"
    hours = []
    if "sample" in rates:
        hours.append(
            f"{tokens / rates['sample'] / 3600:,.2f} of sampling at {rates['sample']:,.0f} tokens a second"
        )
    if "score" in rates:
        hours.append(
            f"{scored / rates['score'] / 3600:,.2f} of scoring at {rates['score']:,.0f} completions a second"
        )
    if hours:
        yield f"hours: at most {', '.join(hours)}"
    there = next(path for path in (recipe.folder, *recipe.folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    needed = tokens * TOKEN_BYTES + rows * ROW_BYTES
    fits = "" if needed <= free else f": {MISFIT}"
    yield f"disk: at most {_size(needed)} of tables, {_size(free)} free at {Path(there)}{fits}"


def _translations(stage: str, prompts: int, source: str, languages: Sequence[str]) -> str:
    """What a translating stage has to do; those that fail a check will be fewer further on."""
    targets = len(set(languages) - {source})
    return f"{stage}: {prompts:,} prompts from {source} into {targets} languages = {prompts * targets:,} translations"


def _comparisons(recipe: Recipe, test: int | None) -> str:
    """What a judge is asked at most; the same text twice is not asked about."""
    arena = recipe.arena
    assert arena is not None
    languages, judge = (
        recipe.arena_languages,
        "the lab" if arena.judge == "lab" else str(recipe.judge and recipe.judge.model),
    )
    if arena.source:
        prompts = _num_prompts(arena, "arena", languages)
    else:
        prompts = None if test is None else test // len(recipe.run.evaluated) * len(languages)
        if arena.limit is not None and prompts is not None:
            prompts = min(prompts, arena.limit * len(languages))
    count = "prompts" if prompts is None else f"{prompts:,} prompts"
    asked = "" if prompts is None else f": at most {2 * prompts * len(recipe.arms):,} judgements"
    return f"arena: {count} in {len(languages)} languages, {len(recipe.arms)} arms, both orders, by {judge}{asked}"


def _num_prompts(section: Prompts | Evaluation | Arena, key: str, languages: tuple[str, ...]) -> int | None:
    """Rows (prompts × languages) that a section gives; None when only the hub knows."""
    assert section.source is not None
    if section.source.startswith("hf:"):
        return None if section.limit is None else section.limit * len(languages)
    loaded = prompts_load.load(
        section.source,
        split=section.split,
        languages=languages,
        limit=section.limit,
        id_column=section.id_column,
        language_column=section.language_column,
        key=key,
    )
    return int(loaded.prompts.num_rows)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
