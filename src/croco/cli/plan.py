"""`croco plan`: what would run, what is complete or stale and why, and what it may cost at most.

Upper bounds from the recipe: every completion as long as allowed. Loads no torch and runs nothing; prompts of files and
of the lab are read to be counted, those of a hub dataset are not.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from croco.config.evaluation import Arena, EuroEval
from croco.config.recipe import Evaluation, Prompts, Recipe
from croco.models.open import engines
from croco.pipeline import arms, graph, run
from croco.pipeline.compute import described
from croco.pipeline.node import Node
from croco.pipeline.status import Status
from croco.stages.prompts import load as prompts_load
from croco.storage import records, shards

# in a table a token is its id (4 bytes) and about as much text, before compression
TOKEN_BYTES = 8
ROW_BYTES = 200
MISFIT = "DOES NOT FIT"  # at most; what `croco doctor` ends on


def describe(recipe: Recipe, until: str | None = None) -> Iterator[str]:
    """Lines for a person: the stages (up to one of them), then counts, tokens and disk."""
    if recipe.study:
        from croco.pipeline.seeds import parts

        for part, last in parts(recipe):
            yield from describe(part, last)
        return
    planned = run.plan(recipe, until)
    yield f"{recipe.folder}"
    for node, status in planned:
        yield f"  {node.title:<28} {_standing(node, status)}"
        for change in status.changes:
            yield f"      {change}"
    yield from (f"engines: {line}" for line in engines(recipe.runtime))
    yield f"workers: {described(recipe.runtime)}"
    yield from cost(recipe, rates(recipe), until)


def _standing(node: Node, status: Status) -> str:
    if status.kind == "complete":
        found = records.read_record(node.folder)
        return f"complete: {run.counted(node, found)}{found['seconds']:.1f} s"
    if status.kind == "unfinished":
        return f"unfinished ({len(shards.shards(node.folder))} shards there): would go on"
    return {"missing": "would run", "stale": "stale, would need --rebuild:"}.get(
        status.kind, "damaged, would need --rebuild:"
    )


def rates(recipe: Recipe) -> dict[str, float]:
    """What stages of this run have recorded: tokens a second of "sample", completions a second of "score"."""
    found = {}
    for stage, fact in (("sample", "tokens_per_second"), ("score", "completions_per_second")):
        folder = recipe.folder / stage
        rate = records.read_record(folder)["facts"].get(fact) if records.state(folder) != "missing" else None
        if rate:
            found[stage] = float(rate)
    return found


def cost(recipe: Recipe, rates: Mapping[str, float], until: str | None = None) -> Iterator[str]:
    """Counts of prompts × languages × completions, and what they may take at most; hours where a rate is known.

    With `until`, a stage before pairs are trained on, those of sampling and scoring alone.
    """
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
        sampled = _sampled(recipe, tuning)
        for owner, (prompts, completions) in sampled.items():
            languages, count = arms.sampled_languages(recipe, owner), arms.num_completions(recipe, owner)
            limit = completions * recipe.sampling.max_new_tokens
            rows, tokens = rows + completions, tokens + limit
            yield (
                f"{'sample' if owner is None else f'sample/{owner}'}: {prompts:,} prompts in {len(languages)} "
                f"languages × {count} completions = {completions:,}, at most {limit:,} tokens"
            )
        for arm in arms.scoring_arms(recipe):
            owner = arms.samples_of(recipe, arm)[1] if arm else None
            count = arms.num_completions(recipe, owner)
            scored += sampled[owner][1] // count * (arms.num_scored(recipe, arm) or count)
        if until is None:
            yield _trained(recipe, tuning)
    if test is not None and until is None:
        evaluation = recipe.evaluation
        tuned = [1 if t == 0 else evaluation.samples for t in set(evaluation.temperatures)]
        base = [
            1 if t == 0 else evaluation.samples
            for t in {*evaluation.temperatures, *evaluation.base_temperatures}
        ]
        num_arms = len(recipe.evaluated_arms)
        completions = test * (sum(base) + num_arms * sum(tuned))
        rows, tokens = rows + completions, tokens + completions * evaluation.max_new_tokens
        yield (
            f"evaluate: {test:,} prompts in {len(recipe.run.evaluated)} languages, {num_arms} arms and "
            f"the base: {completions:,} completions, at most {completions * evaluation.max_new_tokens:,} tokens"
        )
    if recipe.arena is not None and until is None:
        asked = _arena_prompts(recipe, recipe.arena, test)
        yield _comparisons(recipe, recipe.arena, asked)
        drawn = len(graph.arena_sampled(recipe)) * (asked or 0)
        if drawn:
            limit = drawn * (recipe.arena.max_new_tokens or recipe.evaluation.max_new_tokens)
            rows, tokens = rows + drawn, tokens + limit
            yield f"arena-sample: {drawn:,} completions, at most {limit:,} tokens"
    if recipe.euroeval is not None and until is None:
        yield _structured_tasks(recipe, recipe.euroeval)
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


def _sampled(recipe: Recipe, tuning: int) -> dict[str | None, tuple[int, int]]:
    """Of each sampling stage: how many of the `tuning` prompts × languages it asks, and the completions it draws."""
    found = {}
    for owner in arms.sampling_arms(recipe):
        prompts = tuning * len(arms.sampled_languages(recipe, owner)) // len(recipe.run.languages)
        part = recipe.arms[owner].part if owner and recipe.arms[owner].start else None
        prompts = -(-prompts // part[1]) if part else prompts
        found[owner] = prompts, prompts * arms.num_completions(recipe, owner)
    return found


def _trained(recipe: Recipe, tuning: int) -> str:
    """What all arms are tuned on at most: a pair per pool, or as many as the arm asks for."""
    total = 0
    for arm in recipe.arms.values():
        languages = len(recipe.languages_of(arm))
        pools = {"language": languages, "all": 1}[arm.pool] if isinstance(arm.pool, str) else len(arm.pool)
        prompts = tuning // len(recipe.run.languages) // (arm.part[1] if arm.part else 1)
        shown = languages if arm.prompt == "each" and arm.pool == "all" else 1
        training = arm.training
        whole = prompts * pools * arm.pairs_per_pool * shown * training.epochs
        total += training.updates * training.batch_pairs if training.updates else whole
    return f"train: {len(recipe.arms)} arms, at most {total:,} pairs, epochs counted"


def _structured_tasks(recipe: Recipe, section: EuroEval) -> str:
    """What EuroEval is asked to do, and the languages that it has nothing for."""
    datasets = {language: section.datasets_of(language) for language in recipe.run.evaluated}
    none = ", ".join(language for language, names in datasets.items() if not names)
    count, num_arms = sum(map(len, datasets.values())), len(recipe.evaluated_arms)
    uncovered = f"; not covered: {none}" if none else ""
    return f"euroeval: {count} datasets × {section.iterations} iterations, {num_arms} arms and the base{uncovered}"


def _translations(stage: str, prompts: int, source: str, languages: Sequence[str]) -> str:
    """What a translating stage has to do; those that fail a check will be fewer further on."""
    targets = len(set(languages) - {source})
    return f"{stage}: {prompts:,} prompts from {source} into {targets} languages = {prompts * targets:,} translations"


def _arena_prompts(recipe: Recipe, arena: Arena, test: int | None) -> int | None:
    """Prompts × languages that the policies answer before the judge."""
    languages = recipe.arena_languages
    if arena.source:
        return _num_prompts(arena, "arena", languages)
    prompts = None if test is None else test // len(recipe.run.evaluated) * len(languages)
    if arena.limit is not None and prompts is not None:
        prompts = min(prompts, arena.limit * len(languages))
    return prompts


def _comparisons(recipe: Recipe, arena: Arena, prompts: int | None) -> str:
    """What a judge is asked at most; the same text twice is not asked about."""
    languages, num_arms = recipe.arena_languages, len(recipe.evaluated_arms)
    model = recipe.judge if arena.judge == "model" else None
    judge = model.model if model else "the lab"
    count = "prompts" if prompts is None else f"{prompts:,} prompts"
    judgements = 2 * (prompts or 0) * num_arms
    asked = "" if prompts is None else f": at most {judgements:,} judgements"
    if model and judgements:
        asked += f" of at most {judgements * model.max_new_tokens:,} tokens"
    return f"arena: {count} in {len(languages)} languages, {num_arms} arms, both orders, by {judge}{asked}"


def _num_prompts(section: Prompts | Evaluation | Arena, key: str, languages: tuple[str, ...]) -> int | None:
    """Rows (prompts × languages) that a section gives; None when only the hub knows."""
    assert section.source is not None
    if section.source.startswith("hf:"):
        return None if section.limit is None else section.limit * len(languages)
    loaded = prompts_load.load(section, key, languages, section.limit)
    return int(loaded.prompts.num_rows)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
