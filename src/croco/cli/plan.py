"""`croco plan`: what would run, what is complete or stale and why, and what it may cost at most.

Upper bounds from the recipe: every completion as long as allowed. Loads no torch and runs nothing; prompts of files and
of the lab are read to be counted, those of a hub dataset are not.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from croco.cli import price
from croco.cli.price import Load
from croco.config.arms import Arm
from croco.config.evaluation import Arena, EuroEval
from croco.config.models import Model
from croco.config.recipe import Evaluation, Prompts, Recipe
from croco.models.open import engines
from croco.pipeline import arms, inputs, run
from croco.pipeline.compute import described
from croco.pipeline.node import Node
from croco.pipeline.progress import count_of
from croco.pipeline.status import Status
from croco.stages.prompts import load as prompts_load
from croco.storage import records, shards

# in a table a token is its id (4 bytes) and about as much text, before compression
TOKEN_BYTES = 8
ROW_BYTES = 200
# letters of a token, and tokens of a prompt that is not read here: guesses
TOKEN_LETTERS, UNKNOWN_TOKENS = 4, 300
LARGE_BYTES = 10**11
MISFIT = "DOES NOT FIT"  # at most; what `croco doctor` ends on


def describe(recipe: Recipe, until: str | None = None, machine: str | None = None) -> Iterator[str]:
    """Lines for a person: the stages (up to one of them), then counts, tokens, hours on a machine ("8xh100"), disk."""
    where = price.machine(machine) if machine else None
    if recipe.study:
        from croco.pipeline.seeds import parts

        for part, last in parts(recipe):
            yield from describe(part, last, machine)
        return
    planned = run.plan(recipe, until)
    yield f"{recipe.folder}"
    width = max([28, *(len(node.title) for node, _ in planned)])
    for node, status in planned:
        yield f"  {node.title:<{width}} {_standing(node, status)}"
        for change in status.changes:
            yield f"      {change}"
    yield from (f"engines: {line}" for line in engines(recipe))
    yield f"workers: {described(recipe.runtime)}"
    yield from cost(recipe, rates(recipe), until, where)


def _standing(node: Node, status: Status) -> str:
    if status.kind == "complete":
        record = records.read_record(node.folder)
        return f"complete: {run.counted(node, record)}{record['seconds']:.1f} s"
    if status.kind == "unfinished":
        return f"unfinished ({count_of(len(shards.shards(node.folder)), 'shard')} there): would go on"
    return "would run" if status.kind == "missing" else f"{status.kind}, would need --rebuild:"


def rates(recipe: Recipe) -> dict[str, float]:
    """What stages of this run have recorded: tokens a second of "sample", completions a second of "score"."""
    rates = {}
    for stage, fact in (("sample", "tokens_per_second"), ("score", "completions_per_second")):
        folder = recipe.folder / stage
        rate = records.read_record(folder)["facts"].get(fact) if records.state(folder) != "missing" else None
        if isinstance(rate, int | float) and rate > 0:
            rates[stage] = float(rate)
    return rates


@dataclass
class Totals:
    """What the stages come to at most, added up as their lines are printed."""

    loads: list[Load] = field(default_factory=list)
    tokens: int = 0
    rows: int = 0
    scored: int = 0

    def draw(self, stage: str, model: Model, engine: str, completions: int, max_new_tokens: int) -> int:
        """Completions that a model writes; returns their tokens."""
        tokens = completions * max_new_tokens
        self.rows, self.tokens = self.rows + completions, self.tokens + tokens
        self.loads.append(Load(stage, "generate", model, tokens, engine))
        return tokens


def cost(
    recipe: Recipe, rates: Mapping[str, float], until: str | None = None, where: tuple[int, str] | None = None
) -> Iterator[str]:
    """Counts of prompts × languages × completions, and what they may take at most: GPU hours on a machine, disk.

    With `until`, a stage before pairs are trained on, those of sampling and scoring alone.
    """
    totals = Totals()
    tuning, length = num_prompts(recipe.prompts, "prompts", recipe.prompts_languages)
    test, test_length = num_prompts(recipe.evaluation, "evaluation", recipe.evaluation_languages)
    if recipe.translate and tuning is not None:
        tuning *= len(recipe.run.languages)
        yield _translations(recipe, totals, "translate", tuning, recipe.run.languages, length)
    if recipe.translate and recipe.translate.evaluation and test is not None:
        test *= len(recipe.run.evaluated)
        yield _translations(recipe, totals, "eval-translate", test, recipe.run.evaluated, test_length)
    if tuning is not None:
        yield from _made(recipe, totals, tuning, length)
        if until is None:
            yield _trained(recipe, totals, tuning, length)
    if until is None:
        yield from _evaluated(recipe, totals, test)
    if tuning is None or test is None:
        yield "prompts of a hub dataset without a limit are not counted here"
    if where is not None:
        yield from price.prices(totals.loads, recipe.runtime.vllm.tensor_parallel, where, rates)
    asked = {"sample": (totals.tokens, "tokens"), "score": (totals.scored, "completions")}
    hours = [
        f"{count / rates[stage] / 3600:,.2f} of {stage[:-1]}ing at {rates[stage]:,.0f} {unit} a second"
        for stage, (count, unit) in asked.items()
        if stage in rates
    ]
    if hours:
        yield f"hours: at most {', '.join(hours)}"
    elif where is None:
        yield "hours: not known before a stage has run; --machine 8xh100 estimates them"
    yield from _disk(recipe, totals.tokens * TOKEN_BYTES + totals.rows * ROW_BYTES)


def _made(recipe: Recipe, totals: Totals, tuning: int, length: float) -> Iterator[str]:
    """Completions and scores of the `tuning` prompts × languages, of about `length` tokens each."""
    sampling, sampled = recipe.sampling, _sampled(recipe, tuning)
    for owner, (prompts, completions) in sampled.items():
        languages, count = arms.sampled_languages(recipe, owner), arms.num_completions(recipe, owner)
        model = (recipe.arms[owner].sampler if owner else None) or recipe.policy
        stage = "sample" if owner is None else f"sample/{owner}"
        limit = totals.draw(stage, model, recipe.runtime.engines.sample, completions, sampling.max_new_tokens)
        yield (
            f"{stage}: {prompts:,} prompts in {count_of(len(languages), 'language')} × "
            f"{count_of(count, 'completion')} = {completions:,}, at most {limit:,} tokens"
        )
    for arm in arms.scoring_arms(recipe):
        owner = arms.samples_of(recipe, arm)[1] if arm else None
        count = arms.num_completions(recipe, owner)
        totals.scored += sampled[owner][1] // count * (arms.num_scored(recipe, arm) or count)
    read = totals.scored * (sampling.max_new_tokens + length)
    totals.loads += [Load("score", "read", part, read) for part in recipe.reward.parts if not part.function]


def _evaluated(recipe: Recipe, totals: Totals, test: int | None) -> Iterator[str]:
    """Test completions, the arena and structured tasks of all arms and the base."""
    evaluation, num_arms = recipe.evaluation, len(recipe.evaluated_arms)
    engine = recipe.runtime.engines.evaluate
    if test is not None:
        per_prompt = {t: 1 if t == 0 else evaluation.samples for t in evaluation.temperatures}
        base = {t: 1 if t == 0 else evaluation.samples for t in evaluation.base_temperatures} | per_prompt
        completions = test * (sum(base.values()) + num_arms * sum(per_prompt.values()))
        limit = totals.draw("evaluate", recipe.policy, engine, completions, evaluation.max_new_tokens)
        yield (
            f"evaluate: {test:,} prompts in {count_of(len(recipe.run.evaluated), 'language')}, "
            f"{count_of(num_arms, 'arm')} and the base: {completions:,} completions, at most {limit:,} tokens"
        )
    if recipe.arena is not None:
        asked = _arena_prompts(recipe, recipe.arena, test)
        yield _comparisons(recipe, recipe.arena, asked)
        if drawn := len(inputs.arena_sampled(recipe)) * (asked or 0):
            most = recipe.arena.max_new_tokens or evaluation.max_new_tokens
            limit = totals.draw("arena-sample", recipe.policy, engine, drawn, most)
            yield f"arena-sample: {drawn:,} completions, at most {limit:,} tokens"
        if recipe.judge and recipe.arena.judge == "model":
            orders = 2 if recipe.arena.orders == "both" else 1
            verdicts = orders * (asked or 0) * num_arms * recipe.judge.max_new_tokens
            totals.loads.append(
                Load("arena", "generate", recipe.judge, verdicts, recipe.runtime.engines.judge)
            )
    if recipe.euroeval is not None:
        yield _structured_tasks(recipe, recipe.euroeval, totals)


def _disk(recipe: Recipe, needed: int) -> Iterator[str]:
    there = next(path for path in (recipe.folder, *recipe.folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    fits = "" if needed <= free else f": {MISFIT}"
    yield f"disk: at most {_size(needed)} of tables, {_size(free)} free at {Path(there)}{fits}"
    if needed > LARGE_BYTES:
        later = "once the page is made they can be archived elsewhere, and another arm of the same run needs them back"
        yield f"disk: most of it is completions (sample/); {later}"


def _sampled(recipe: Recipe, tuning: int) -> dict[str | None, tuple[int, int]]:
    """Of each sampling stage: how many of the `tuning` prompts × languages it asks, and the completions it draws."""
    sampled = {}
    for owner in arms.sampling_arms(recipe):
        prompts = tuning * len(arms.sampled_languages(recipe, owner)) // len(recipe.run.languages)
        part = recipe.arms[owner].part if owner and recipe.arms[owner].start else None
        prompts = -(-prompts // part[1]) if part else prompts
        sampled[owner] = prompts, prompts * arms.num_completions(recipe, owner)
    return sampled


def _trained(recipe: Recipe, totals: Totals, tuning: int, length: float) -> str:
    """The pairs that all arms are tuned on at most: one per pool, or as many as the arm asks for."""
    total = 0
    for arm in recipe.arms.values():
        prompts = tuning // len(recipe.run.languages) // (arm.part[1] if arm.part else 1)
        training = arm.training
        whole = prompts * _pairs_of_a_prompt(arm, recipe.languages_of(arm)) * training.epochs
        pairs = training.updates * training.batch_pairs if training.updates else whole
        tokens = min(length + 2 * recipe.sampling.max_new_tokens, 2 * training.max_tokens)
        totals.loads.append(Load("train", "train", recipe.policy, pairs * tokens))
        total += pairs
    return f"train: {count_of(len(recipe.arms), 'arm')}, at most {total:,} pairs, epochs counted"


def _pairs_of_a_prompt(arm: Arm, languages: Sequence[str]) -> int:
    """At most, over all of its pools; a language in no group is a pool of its own."""
    if arm.pool == "language" or arm.prompt == "each":
        return len(languages) * arm.pairs_per_pool
    if arm.pool == "all":
        return arm.pairs_per_pool
    groups = {next((name for name, of in arm.pool.items() if code in of), code) for code in languages}
    return len(groups) * arm.pairs_per_pool


def _structured_tasks(recipe: Recipe, section: EuroEval, totals: Totals) -> str:
    """What EuroEval is asked to do, and the languages that it has nothing for."""
    datasets = {language: section.datasets_of(language) for language in recipe.run.evaluated}
    none = ", ".join(language for language, names in datasets.items() if not names)
    count, num_arms = sum(map(len, datasets.values())), len(recipe.evaluated_arms)
    tokens = count * section.iterations * (num_arms + 1) * price.EUROEVAL_TOKENS
    totals.loads.append(Load("euroeval", "read", recipe.policy, tokens))
    uncovered = f"; not covered: {none}" if none else ""
    work = f"{count_of(count, 'dataset')} × {count_of(section.iterations, 'iteration')}"
    return f"euroeval: {work}, {count_of(num_arms, 'arm')} and the base{uncovered}"


def _translations(
    recipe: Recipe, totals: Totals, stage: str, rows: int, languages: Sequence[str], length: float
) -> str:
    """What a translating stage has to do; those that fail a check will be fewer further on."""
    section = recipe.translate
    assert section is not None
    prompts, targets = rows // len(languages), len(set(languages) - {section.source})
    totals.loads.append(
        Load(stage, "generate", section, prompts * targets * length, recipe.runtime.engines.translate)
    )
    made = f"{count_of(targets, 'language')} = {count_of(prompts * targets, 'translation')}"
    return f"{stage}: {prompts:,} prompts from {section.source} into {made}"


def _arena_prompts(recipe: Recipe, arena: Arena, test: int | None) -> int | None:
    """Prompts × languages that the policies answer before the judge."""
    languages = recipe.arena_languages
    if arena.source:
        return num_prompts(arena, "arena", languages)[0]
    prompts = None if test is None else test // len(recipe.run.evaluated) * len(languages)
    if arena.limit is not None and prompts is not None:
        prompts = min(prompts, arena.limit * len(languages))
    return prompts


def _comparisons(recipe: Recipe, arena: Arena, prompts: int | None) -> str:
    """What a judge is asked at most; the same text twice is not asked about."""
    languages, num_arms = count_of(len(recipe.arena_languages), "language"), len(recipe.evaluated_arms)
    model = recipe.judge if arena.judge == "model" else None
    judge = model.model if model else "the lab"
    count = "prompts" if prompts is None else count_of(prompts, "prompt")
    orders, shown = (2, "both orders") if arena.orders == "both" else (1, "one order")
    judgements = orders * (prompts or 0) * num_arms
    asked = "" if prompts is None else f": at most {judgements:,} judgements"
    if model and judgements:
        asked += f" of at most {judgements * model.max_new_tokens:,} tokens"
    return f"arena: {count} in {languages}, {count_of(num_arms, 'arm')}, {shown}, by {judge}{asked}"


def num_prompts(
    section: Prompts | Evaluation | Arena, key: str, languages: tuple[str, ...]
) -> tuple[int | None, float]:
    """Rows (prompts × languages) that a section gives, None when only the hub knows; and the tokens of one, about."""
    assert section.source is not None
    if section.source.startswith("hf:"):
        return None if section.limit is None else section.limit * len(languages), UNKNOWN_TOKENS
    prompts = prompts_load.load(section, key, languages, section.limit).prompts
    some = prompts.slice(0, 1000).column("messages").to_pylist()
    letters = sum(len(message["content"]) for messages in some for message in messages)
    return int(prompts.num_rows), letters / TOKEN_LETTERS / max(len(some), 1)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
