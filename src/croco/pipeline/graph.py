"""The method on one screen: every stage with its version, function, table, settings, inputs and arms.

    prompts (→ translate) → sample → score → pair → train ─┐
    eval-prompts (→ eval-translate) ───────────────────────┴→ evaluate (→ arena, euroeval) → results → report

[arena] may have prompts of its own, or completions of its own: then arena-prompts and arena-sample come before it.
What the settings hold is `fingerprint.py`, what arms share `arms.py`, what a stage is `node.py`. Nothing runs here: a
stage's function is imported when it runs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.pipeline import arms
from croco.pipeline import fingerprint as fp
from croco.pipeline.node import Node, Reference, Stage
from croco.storage import records

# What stages read, and for which arms they run ----------------------------------------------------------------------


def translated(recipe: Recipe) -> list[str | None]:
    return [None] if recipe.translate else []


def eval_translated(recipe: Recipe) -> list[str | None]:
    return [None] if recipe.translate and recipe.translate.evaluation else []


def euroeval_arms(recipe: Recipe) -> list[str | None]:
    return arms.evaluated_arms(recipe) if recipe.euroeval else []


def arena_arms(recipe: Recipe) -> list[str | None]:
    return [*recipe.evaluated_arms] if recipe.arena else []


def arena_prompts(recipe: Recipe) -> list[str | None]:
    return [None] if recipe.arena and recipe.arena.source else []


def arena_sampled(recipe: Recipe) -> list[str | None]:
    """Nothing is sampled again where `evaluate` has drawn the same greedy completions."""
    if recipe.arena is None:
        return []
    evaluation, limit = recipe.evaluation, recipe.arena.max_new_tokens
    same = 0.0 in evaluation.temperatures and limit in (None, evaluation.max_new_tokens)
    return [] if same and not recipe.arena.source else arms.evaluated_arms(recipe)


def compared_from(recipe: Recipe, arm: str | None) -> list[Reference]:
    """What an arm's comparisons are made of: prompts, and the completions of the base and of the arm."""
    drawn = "arena-sample" if arena_sampled(recipe) else "evaluate"
    return [arena_prompts_of(recipe), (drawn, "base"), (drawn, arm)]


# a translated table stands in for the one it was made from: those that read it know it by the same name
STANDS_FOR = {"translate": "prompts", "eval-translate": "eval-prompts"}


def prompts_of(recipe: Recipe) -> Reference:
    return ("translate" if translated(recipe) else "prompts", None)


def eval_prompts_of(recipe: Recipe) -> Reference:
    return ("eval-translate" if eval_translated(recipe) else "eval-prompts", None)


def sampled_from(recipe: Recipe, arm: str | None) -> list[Reference]:
    """The prompts, and the adapter of the arm whose policy samples."""
    start = arms.arm_of(recipe, arm).start if arm else None
    return [prompts_of(recipe)] + ([("train", start)] if start else [])


def arena_prompts_of(recipe: Recipe) -> Reference:
    return ("arena-prompts", None) if arena_prompts(recipe) else eval_prompts_of(recipe)


def scored_from(recipe: Recipe, arm: str | None) -> list[Reference]:
    """Prompts and completions, and the arm whose implicit reward is the score."""
    if arm is None:
        return [prompts_of(recipe), ("sample", None)]
    implicit = arms.arm_of(recipe, arm).implicit
    own: list[Reference] = [("train", implicit.arm)] if implicit else []
    return [prompts_of(recipe), arms.samples_of(recipe, arm), *own]


def paired_from(recipe: Recipe, arm: str | None) -> list[Reference]:
    """What an arm's pairs are made of; data for SFT on gold completions needs the prompts alone."""
    section = arms.arm_of(recipe, arm)
    if not arms.contrasted(section):
        return [prompts_of(recipe)]
    gold: list[Reference] = [("score-references", None)] if section.chosen == "reference" else []
    return [prompts_of(recipe), arms.samples_of(recipe, arm), arms.scores_of(recipe, arm), *gold]


def trained_from(recipe: Recipe, arm: str | None) -> list[Reference]:
    """An arm's pairs, and the adapter that it goes on training."""
    start = arms.arm_of(recipe, arm).start
    return [("pair", arm)] + ([("train", start)] if start else [])


def policy_of(recipe: Recipe, arm: str | None) -> list[Reference]:
    """What an arm's policy is beside the base."""
    return [] if arm == "base" else [("train", arm)]


def evaluated_from(recipe: Recipe, arm: str | None) -> list[Reference]:
    return [eval_prompts_of(recipe), *policy_of(recipe, arm)]


def arena_sampled_from(recipe: Recipe, arm: str | None) -> list[Reference]:
    return [arena_prompts_of(recipe), *policy_of(recipe, arm)]


def translated_from(recipe: Recipe, arm: str | None) -> list[Reference]:
    return [("prompts", None)]


def eval_translated_from(recipe: Recipe, arm: str | None) -> list[Reference]:
    return [("eval-prompts", None)]


def gold_scored_from(recipe: Recipe, arm: str | None) -> list[Reference]:
    return [prompts_of(recipe)]


def nothing(recipe: Recipe, arm: str | None) -> list[Reference]:
    return []


def summed_from(recipe: Recipe, arm: str | None) -> list[Reference]:
    """What the results add up."""
    parts = [("evaluate", arms.evaluated_arms), ("euroeval", euroeval_arms), ("arena", arena_arms)]
    return [eval_prompts_of(recipe), *((stage, name) for stage, of in parts for name in of(recipe))]


def shown_from(recipe: Recipe, arm: str | None) -> list[Reference]:
    """What the report shows."""
    parts = [
        ("sample", arms.sampling_arms),
        ("score", arms.scoring_arms),
        ("pair", arms.tuned_arms),
        ("train", arms.tuned_arms),
    ]
    made = [(stage, name) for stage, of in parts for name in of(recipe)]
    return [prompts_of(recipe), eval_prompts_of(recipe), *made, ("results", None)]


# The stages ---------------------------------------------------------------------------------------------------------

# fmt: off
STAGES: tuple[Stage, ...] = (
    Stage("prompts", 1, "croco.stages.prompts.load:prompts", "prompts",
          settings=fp.tuning_prompts_settings, inputs=nothing),
    Stage("translate", 1, "croco.stages.translate.translate:translate", "prompts",
          settings=fp.translate_settings, inputs=translated_from, arms=translated),
    Stage("sample", 1, "croco.stages.sample:sample", "completions",
          settings=fp.sample_settings, inputs=sampled_from, arms=arms.sampling_arms),
    Stage("score", 1, "croco.stages.score.score:score", "scores",
          settings=fp.score_settings, inputs=scored_from, arms=arms.scoring_arms,
          reads_all=("completion", "sample")),
    Stage("score-references", 1, "croco.stages.score.score:score_references", "scores",
          settings=fp.references_settings, inputs=gold_scored_from, arms=arms.gold_arms),
    Stage("pair", 2, "croco.stages.pair.pair:pair", "pairs",
          settings=fp.pair_settings, inputs=paired_from, arms=arms.tuned_arms,
          added=("evaluated",)),
    Stage("train", 2, "croco.stages.train.train:train", "",
          settings=fp.train_settings, inputs=trained_from, arms=arms.tuned_arms,
          makes=("adapter", "adapter.partial", "model", "model.partial", "metrics.jsonl")),
    Stage("eval-prompts", 1, "croco.stages.prompts.load:eval_prompts", "prompts",
          settings=fp.eval_prompts_settings, inputs=nothing,
          check="croco.stages.prompts.load:check_overlap"),
    Stage("eval-translate", 1, "croco.stages.translate.translate:translate", "prompts",
          settings=fp.eval_translate_settings, inputs=eval_translated_from, arms=eval_translated),
    Stage("evaluate", 2, "croco.stages.evaluate.evaluate:evaluate", "verdicts",
          settings=fp.evaluate_settings, inputs=evaluated_from, arms=arms.evaluated_arms),
    Stage("euroeval", 1, "croco.stages.euroeval.euroeval:euroeval", "results",
          settings=fp.euroeval_settings, inputs=policy_of, arms=euroeval_arms,
          check="croco.stages.euroeval.euroeval:check", makes=("euroeval_benchmark_results.jsonl",)),
    Stage("arena-prompts", 1, "croco.stages.prompts.load:arena_prompts", "prompts",
          settings=fp.arena_prompts_settings, inputs=nothing, arms=arena_prompts),
    Stage("arena-sample", 1, "croco.stages.arena.arena:sample", "completions",
          settings=fp.arena_sample_settings, inputs=arena_sampled_from, arms=arena_sampled),
    Stage("arena", 1, "croco.stages.arena.arena:arena", "comparisons",
          settings=fp.arena_settings, inputs=compared_from, arms=arena_arms, added=("evaluated",)),
    Stage("results", 2, "croco.stages.results:results", "results",
          settings=fp.results_settings, inputs=summed_from),
    Stage("report", 1, "croco.report.page:report", "",
          settings=fp.report_settings, inputs=shown_from, makes=("report.html",)),
)
# fmt: on
_BY_NAME: dict[str, Stage] = {stage.name: stage for stage in STAGES}


def known_stage(name: str) -> Stage:
    if name not in _BY_NAME:
        raise UserError(f"'{name}' is no stage, expected one of {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


# What a recipe makes of them ----------------------------------------------------------------------------------------


def nodes(recipe: Recipe) -> list[Node]:
    """Every stage of every arm, in an order that can be run; names what is missing before anything is written."""
    made: dict[Reference, Node] = {}

    def make(name: str, arm: str | None) -> Node:
        """The node, after all that it reads: an arm that starts from another one comes after its training."""
        if (name, arm) not in made:
            stage, folder = _BY_NAME[name], recipe.folder / name
            reads = stage.inputs(recipe, arm)
            inputs = {_input_name(arm, before, reads): make(*before) for before in reads}
            where = folder if arm is None else folder / arm
            made[name, arm] = _as_recorded(Node(stage, arm, where, stage.settings(recipe, arm), inputs))
        return made[name, arm]

    for stage in STAGES:
        for arm in stage.arms(recipe):
            make(stage.name, arm)
    return list(made.values())


def _as_recorded(node: Node) -> Node:
    """The node with the fingerprint that its record has, where that differs only by settings which the croco that wrote
    it did not know yet: what an earlier version made stays complete."""
    if not node.stage.added or not os.path.lexists(node.folder / records.RECORD):
        return node
    try:
        record = records.read_record(node.folder)
    except UserError:
        return node  # what is wrong with it is the status's to say
    absent = [name for name in node.stage.added if name not in record["science"]["settings"]]
    earlier = replace(node, not_recorded=tuple(absent))
    return earlier if earlier.fingerprint == record["fingerprint"] else node


def _input_name(arm: str | None, before: Reference, reads: Sequence[Reference]) -> str:
    """An arm's own table of a kind is "pair", as is the only one that it reads; others are "pair/monolingual"."""
    name, its_arm = STANDS_FOR.get(before[0], before[0]), before[1]
    only = arm is not None and [kind for kind, _ in reads].count(before[0]) == 1
    return name if its_arm in (None, arm) or only else f"{name}/{its_arm}"
