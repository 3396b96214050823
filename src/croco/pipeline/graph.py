"""The method on one screen: every stage with its version, function, table, settings, inputs and arms.

    prompts (→ translate) → sample → score → pair → train ─┐
    eval-prompts (→ eval-translate) ───────────────────────┴→ evaluate (→ arena, euroeval) → results → report

[arena] may have prompts of its own, or completions of its own: then arena-prompts and arena-sample come before it.
`node.py` has the records Stage and Node, `fingerprint.py` what settings hold, `inputs.py` what a stage reads, `arms.py`
what arms share. Nothing runs here: a stage's function is imported when it runs.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

from croco.config.recipe import Recipe
from croco.errors import UserError
from croco.pipeline import arms, inputs
from croco.pipeline import fingerprint as fp
from croco.pipeline.node import Node, Reference, Stage
from croco.storage import records

# The stages ---------------------------------------------------------------------------------------------------------

# fmt: off
STAGES: tuple[Stage, ...] = (
    Stage("prompts", 1, "croco.stages.prompts.load:prompts", "prompts",
          settings=lambda recipe, arm: fp.prompts_settings(recipe, "prompts")),
    Stage("translate", 1, "croco.stages.translate.translate:translate", "prompts",
          settings=lambda recipe, arm: fp.translate_settings(recipe, recipe.run.languages),
          inputs=lambda recipe, arm: [("prompts", None)], arms=inputs.translated),
    Stage("sample", 1, "croco.stages.sample:sample", "completions",
          settings=fp.sample_settings, inputs=inputs.sampled_from, arms=arms.sampling_arms),
    Stage("score", 1, "croco.stages.score.score:score", "scores",
          settings=fp.score_settings, inputs=inputs.scored_from, arms=arms.scoring_arms,
          reads_all=("completion", "sample")),
    Stage("score-references", 1, "croco.stages.score.score:score_references", "scores",
          settings=lambda recipe, arm: {"reward": fp.given_reward(recipe.reward)},
          inputs=lambda recipe, arm: [inputs.prompts_of(recipe)], arms=arms.gold_arms),
    Stage("pair", 2, "croco.stages.pair.pair:pair", "pairs",
          settings=fp.pair_settings, inputs=inputs.paired_from, arms=arms.tuned_arms,
          added=("evaluated",)),
    Stage("train", 2, "croco.stages.train.stage:train", "",
          settings=fp.train_settings, inputs=inputs.trained_from, arms=arms.tuned_arms,
          makes=("adapter", "adapter.partial", "model", "model.partial", "metrics.jsonl")),
    Stage("eval-prompts", 1, "croco.stages.prompts.load:prompts", "prompts",
          settings=lambda recipe, arm: fp.test_prompts_settings(recipe, "evaluation"),
          check="croco.stages.prompts.load:check_overlap"),
    Stage("eval-translate", 1, "croco.stages.translate.translate:translate", "prompts",
          settings=lambda recipe, arm: fp.translate_settings(recipe, recipe.run.evaluated),
          inputs=lambda recipe, arm: [("eval-prompts", None)], arms=inputs.eval_translated),
    Stage("evaluate", 2, "croco.stages.evaluate.evaluate:evaluate", "verdicts",
          settings=fp.evaluate_settings, arms=arms.evaluated_arms,
          inputs=lambda recipe, arm: [inputs.eval_prompts_of(recipe), *inputs.policy_of(recipe, arm)]),
    Stage("euroeval", 1, "croco.stages.euroeval.euroeval:euroeval", "results",
          settings=fp.euroeval_settings, inputs=inputs.policy_of, arms=inputs.euroeval_arms,
          check="croco.stages.euroeval.euroeval:check", makes=("euroeval_benchmark_results.jsonl",)),
    Stage("arena-prompts", 1, "croco.stages.prompts.load:prompts", "prompts",
          settings=lambda recipe, arm: fp.test_prompts_settings(recipe, "arena"), arms=inputs.arena_prompts),
    Stage("arena-sample", 1, "croco.stages.arena.arena:sample", "completions",
          settings=fp.arena_sample_settings, arms=inputs.arena_sampled,
          inputs=lambda recipe, arm: [inputs.arena_prompts_of(recipe), *inputs.policy_of(recipe, arm)]),
    Stage("arena", 1, "croco.stages.arena.arena:arena", "comparisons",
          settings=fp.arena_settings, inputs=inputs.compared_from, arms=inputs.arena_arms, added=("evaluated",)),
    Stage("results", 2, "croco.stages.results:results", "results",
          settings=fp.results_settings, inputs=inputs.summed_from),
    Stage("report", 1, "croco.report.page:report", "",
          settings=lambda recipe, arm: {"name": recipe.run.name}, inputs=inputs.shown_from, makes=("report.html",)),
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
            before = {_input_name(arm, one, reads): make(*one) for one in reads}
            where = folder if arm is None else folder / arm
            made[name, arm] = _as_recorded(Node(stage, arm, where, stage.settings(recipe, arm), before))
        return made[name, arm]

    for stage in STAGES:
        for arm in stage.arms(recipe):
            make(stage.name, arm)
    return list(made.values())


def _as_recorded(node: Node) -> Node:
    """The node with its record's fingerprint, where that differs only by settings which the croco that wrote it did not
    know: what an earlier version made stays complete."""
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
    name, its_arm = inputs.STANDS_FOR.get(before[0], before[0]), before[1]
    only = arm is not None and [kind for kind, _ in reads].count(before[0]) == 1
    return name if its_arm in (None, arm) or only else f"{name}/{its_arm}"
