"""The stages in order, on one screen; then what a recipe makes of them: plan them, run them.

    prompts (→ translate) → sample → score → pair → train ─┐
    eval-prompts (→ eval-translate) ───────────────────────┴→ evaluate (→ arena, euroeval) → results → report

[arena] may have prompts of its own, or completions of its own: then arena-prompts and arena-sample come before it.

What enters a stage's fingerprint is `science.py`, what a stage is `stage.py`. Nothing here computes: a stage's function
is imported when it runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from croco.config.recipe import Recipe
from croco.config.runtime import Runtime
from croco.errors import UserError
from croco.models import open
from croco.pipeline import arms, fingerprint, status
from croco.pipeline import inputs as follows
from croco.pipeline import stage as stages
from croco.pipeline.stage import Node, Reference, Stage
from croco.pipeline.status import Status
from croco.storage import shards
from croco.storage.hashing import canonical
from croco.storage.schemas import TABLES
from croco.storage.shards import Record

Say = Callable[[str], None]
WRITTEN = {
    "run",
    "prompts",
    "policy",
    "reward",
    "sampling",
    "evaluation",
    "arms",
    "runtime",
    "study",
}  # in recipe.json


STAGES: tuple[Stage, ...] = (
    Stage(
        name="prompts",
        version=1,
        function="croco.stages.prompts.load:prompts",
        table="prompts",
        settings=lambda recipe, arm: fingerprint.prompts_settings(
            recipe, recipe.prompts, "prompts", recipe.prompts_languages
        ),
        follows=lambda recipe, arm: [],
    ),
    Stage(
        name="translate",
        version=1,
        function="croco.stages.translate.translate:translate",
        table="prompts",
        settings=lambda recipe, arm: fingerprint.translate_settings(recipe, recipe.run.languages),
        follows=lambda recipe, arm: [("prompts", None)],
        arms=follows.translated,
    ),
    Stage(
        name="sample",
        version=1,
        function="croco.stages.sample:sample",
        table="completions",
        settings=fingerprint.sample_settings,
        follows=follows.sampled_from,
        arms=arms.sampling_arms,
    ),
    Stage(
        name="score",
        version=1,
        function="croco.stages.score.score:score",
        table="scores",
        settings=fingerprint.score_settings,
        follows=follows.scored_from,
        arms=arms.scoring_arms,
        reads_all=("completion", "sample"),
    ),
    Stage(
        name="score-references",
        version=1,
        function="croco.stages.score.score:score_references",
        table="scores",
        settings=fingerprint.references_settings,
        follows=lambda recipe, arm: [follows.prompts_of(recipe)],
        arms=arms.gold_arms,
    ),
    Stage(
        name="pair",
        version=2,
        function="croco.stages.pair.pair:pair",
        table="pairs",
        settings=fingerprint.pair_settings,
        added=("held_out_languages",),
        follows=follows.paired_from,
        arms=arms.tuned_arms,
    ),
    Stage(
        name="train",
        version=2,
        function="croco.stages.train.train:train",
        table="",
        makes=("adapter", "adapter.partial", "model", "model.partial", "metrics.jsonl"),
        settings=fingerprint.train_settings,
        follows=follows.trained_from,
        arms=arms.tuned_arms,
    ),
    Stage(
        name="eval-prompts",
        version=1,
        function="croco.stages.prompts.load:eval_prompts",
        table="prompts",
        settings=lambda recipe, arm: fingerprint.test_prompts_settings(
            recipe, recipe.evaluation, "evaluation", recipe.evaluation_languages
        ),
        follows=lambda recipe, arm: [],
    ),
    Stage(
        name="eval-translate",
        version=1,
        function="croco.stages.translate.translate:translate",
        table="prompts",
        settings=lambda recipe, arm: fingerprint.translate_settings(recipe, recipe.run.evaluated),
        follows=lambda recipe, arm: [("eval-prompts", None)],
        arms=follows.eval_translated,
    ),
    Stage(
        name="evaluate",
        version=2,
        function="croco.stages.evaluate.evaluate:evaluate",
        table="verdicts",
        settings=fingerprint.evaluate_settings,
        follows=lambda recipe, arm: [follows.eval_prompts_of(recipe), *follows.policy_of(arm)],
        arms=arms.evaluated_arms,
    ),
    Stage(
        name="euroeval",
        version=1,
        function="croco.stages.euroeval.euroeval:euroeval",
        table="results",
        makes=("euroeval_benchmark_results.jsonl",),
        settings=fingerprint.euroeval_settings,
        follows=lambda recipe, arm: follows.policy_of(arm),
        arms=follows.euroeval_arms,
    ),
    Stage(
        name="arena-prompts",
        version=1,
        function="croco.stages.prompts.load:arena_prompts",
        table="prompts",
        settings=fingerprint.arena_prompts_settings,
        follows=lambda recipe, arm: [],
        arms=follows.arena_prompts,
    ),
    Stage(
        name="arena-sample",
        version=1,
        function="croco.stages.arena.arena:sample",
        table="completions",
        settings=fingerprint.arena_sample_settings,
        follows=lambda recipe, arm: [follows.arena_prompts_of(recipe), *follows.policy_of(arm)],
        arms=follows.arena_sampled,
    ),
    Stage(
        name="arena",
        version=1,
        function="croco.stages.arena.arena:arena",
        table="comparisons",
        settings=fingerprint.arena_settings,
        added=("evaluated",),
        follows=follows.compared_from,
        arms=follows.arena_arms,
    ),
    Stage(
        name="results",
        version=2,
        function="croco.stages.evaluate.evaluate:results",
        table="results",
        settings=fingerprint.results_settings,
        follows=follows.summed_from,
    ),
    Stage(
        name="report",
        version=1,
        function="croco.report.page:report",
        table="",
        makes=("report.html",),
        settings=fingerprint.report_settings,
        follows=follows.shown_from,
    ),
)
_BY_NAME: dict[str, Stage] = {stage.name: stage for stage in STAGES}


# What a recipe makes of them ----------------------------------------------------------------------------------------


def nodes(recipe: Recipe) -> list[Node]:
    """Every stage of every arm, in an order that can be run; names what is missing before anything is written."""
    made: dict[Reference, Node] = {}

    def make(name: str, arm: str | None) -> Node:
        """The node, after all that it reads: an arm that starts from another one comes after its training."""
        if (name, arm) not in made:
            stage, folder = _BY_NAME[name], recipe.folder / name
            reads = stage.follows(recipe, arm)
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
    if not node.stage.added or not os.path.lexists(node.folder / shards.RECORD):
        return node
    try:
        record = shards.read_record(node.folder)
    except UserError:
        return node  # what is wrong with it is the status's to say
    absent = [name for name in node.stage.added if name not in record["science"]["settings"]]
    earlier = replace(node, not_recorded=tuple(absent))
    return earlier if earlier.fingerprint == record["fingerprint"] else node


def _input_name(arm: str | None, before: Reference, reads: Sequence[Reference]) -> str:
    """An arm's own table of a kind is "pair", as is the only one that it reads; others are "pair/monolingual"."""
    name, its_arm = follows.STANDS_FOR.get(before[0], before[0]), before[1]
    only = arm is not None and [kind for kind, _ in reads].count(before[0]) == 1
    return name if its_arm in (None, arm) or only else f"{name}/{its_arm}"


def _until(every: list[Node], until: str | None) -> list[Node]:
    return every if until is None else every[: every.index(_of_stage(every, until)[-1]) + 1]


def plan(recipe: Recipe, until: str | None = None) -> list[tuple[Node, Status]]:
    """How each stage stands: complete, unfinished, missing, or stale with what changed."""
    return [(node, status.status(node)) for node in _until(nodes(recipe), until)]


def run(
    recipe: Recipe, *, rebuild: bool = False, until: str | None = None, say: Say = lambda line: None
) -> list[str]:
    """Run what is not complete, in order; returns the names of the stages that are complete now.

    Raises StaleStage naming what changed, unless `rebuild` removes it.
    """
    open.check(recipe)
    every = nodes(recipe)
    todo = _until(every, until)
    set_threads(recipe)
    with stages.lock(recipe.folder):
        check_euroeval(todo, recipe)
        status.stop_or_clear(todo, rebuild, say)
        check_test_prompts(todo, recipe, say)
        keep_recipe(recipe, every, say)
        for node in todo:
            run_node(node, recipe.runtime, say)
    return list(dict.fromkeys(node.stage.name for node in todo))


def run_stage(
    recipe: Recipe, name: str, *, arm: str | None = None, rebuild: bool = False, say: Say = lambda line: None
) -> None:
    """Run one stage (of one arm, if named); what it reads must be complete."""
    if recipe.study:
        raise UserError(
            f"{name}: the recipe is a study, expected that of one run, such as {recipe.folder}/seed-0/recipe.json"
        )
    if arm is not None and arm not in ("base", *recipe.arms):
        raise UserError(f"--arm {arm}: no such arm, expected one of base, {', '.join(recipe.arms)}")
    open.check(recipe)
    every = nodes(recipe)
    todo = _of_stage(every, name)
    if arm is not None:
        read = [before for node in every if node.arm == arm for before in node.inputs.values()]
        mine = [node for node in todo if node.arm == arm] or [node for node in todo if node in read]
        todo = mine or [node for node in todo if node.arm is None]
        if not todo:
            raise UserError(f"--arm {arm}: {name} has no such arm")
    set_threads(recipe)
    with stages.lock(recipe.folder):
        check_euroeval(todo, recipe)
        for node in todo:
            for before in node.inputs.values():
                _require(node, before)
        status.stop_or_clear(todo, rebuild, say, every)
        keep_recipe(recipe, every, say)
        for node in todo:
            run_node(node, recipe.runtime, say)


def check_test_prompts(todo: Sequence[Node], recipe: Recipe, say: Say) -> None:
    """Before anything is written: raise UserError when most test prompts are prompts tuned on, say when some are."""
    if any(node.stage.name == "eval-prompts" and status.status(node).kind == "missing" for node in todo):
        from croco.stages.prompts.load import overlap

        same, num = overlap(recipe)
        sentence = f"{same:,} of {num:,} test prompts of evaluation.source = '{recipe.evaluation.source}' are prompts"
        if 2 * same > num:
            raise UserError(f"{sentence} of prompts.source = '{recipe.prompts.source}' too: expected others")
        if same:
            say(f"{'eval-prompts':<24} {sentence} tuned on too")


def _require(node: Node, before: Node) -> None:
    """Raise UserError unless what a node reads is complete."""
    now = status.status(before)
    if now.kind == "damaged":
        raise UserError(status.stale_message([(before, now)]))
    if now.kind != "complete":
        raise UserError(f"{node.title} reads {before.title}, which is {now.kind}: run `croco run` first")


def check_euroeval(todo: Sequence[Node], recipe: Recipe) -> None:
    """Raise UserError when the stage euroeval would run and lacks its environment or servers."""
    if any(node.stage.name == "euroeval" and status.status(node).kind != "complete" for node in todo):
        from croco.stages.euroeval import euroeval

        euroeval.check(recipe)


def _of_stage(every: Sequence[Node], name: str) -> list[Node]:
    """The nodes of one stage; raises UserError when there is no such stage or the recipe has no use for it."""
    found = [node for node in every if node.stage.name == known_stage(name).name]
    if not found:
        raise UserError(
            f"{name}: nothing to do, the recipe does not ask for it (see [translate], [arena] and [euroeval])"
        )
    return found


def run_node(node: Node, runtime: Runtime, say: Say) -> None:
    """Run one node, saying in one line what became of it."""
    now = status.status(node)
    if now.kind == "complete":
        stages.remove_scratch(node)  # of a run that was killed while it went
        mended = ", its ledger is written again" if status.mend_ledger(node) else ""
        say(f"{node.title:<24} complete, skipped{mended}")
        return
    if now.kind == "unfinished":
        say(f"{node.title:<24} unfinished, going on")
    found = stages.execute(node, runtime)
    say(f"{node.title:<24} {counted(node, found)}{found['seconds']:.1f} s")


def counted(node: Node, found: Record) -> str:
    """What a finished stage wrote and left out, for a line on the terminal."""
    counts = found["counts"]
    own = TABLES[node.stage.table].unit if node.stage.table else None
    written = [(count, unit) for unit, count in counts.get("written", {}).items() if own in (None, unit)]
    parts = [f"{count:,} {unit}s" for count, unit in written]
    for unit, count in counts.get("dropped", {}).items():  # a flag marks, it drops nothing
        parts.append(f"{count:,} {unit}s" + (" dropped" if unit != "flag" else ""))
    return "".join(f"{part}, " for part in parts)


def rebuild_report(recipe: Recipe, say: Say = lambda line: None) -> Path:
    """Make the page of a finished run again, whether or not it is there; returns its path."""
    node = nodes(recipe)[-1]
    with stages.lock(recipe.folder):
        for before in node.inputs.values():
            _require(node, before)
        if status.status(node).kind != "missing":  # the old page stays until the new one is there
            shards.write_record(node.folder, stages.new_record(node, recipe.runtime.shard_prompts))
        run_node(node, recipe.runtime, say)
    return node.folder / "report.html"


def known_stage(name: str) -> Stage:
    if name not in _BY_NAME:
        raise UserError(f"'{name}' is no stage, expected one of {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def keep_recipe(recipe: Recipe, every: Sequence[Node] = (), say: Say = lambda line: None) -> None:
    """Write the resolved recipe into the run's folder, which explains itself and is all that `croco report` needs.

    One that is there stays where another setting made a stage that is there too: it describes what lies in the folder.
    Raises UserError for a recipe.json that is a person's own.
    """
    path, resolved = recipe.folder / "recipe.json", recipe.model_dump(mode="json")
    if os.path.lexists(path):
        there = shards.read_json(path)
        if there == resolved:
            return
        if not isinstance(there, dict) or not there.keys() >= WRITTEN:
            raise UserError(
                f"{path} is no resolved recipe: croco has not written it, expected another run.folder, or no such file"
            )
        for node in every[:-1]:  # the page describes itself
            if status.status(node).kind == "stale" and _made_otherwise(node):
                say(f"recipe.json stays as it is, for {node.title} was made with other settings")
                return
    shards.write_json(path, resolved)


def _made_otherwise(node: Node) -> bool:
    """Whether a stage has other settings, or has read a table that is not there any more; that more tables are to be
    read (of an arm that was added) is no contradiction."""
    made = shards.read_record(node.folder)["science"]
    if canonical(made["settings"]) != canonical(node.science["settings"]):
        return True
    for name, before in node.inputs.items():
        read = made["inputs"].get(name, before.fingerprint)
        if read != before.fingerprint and (
            shards.state(before.folder) == "missing"
            or shards.read_record(before.folder)["fingerprint"] != read
        ):
            return True
    return False


def set_threads(recipe: Recipe) -> None:
    """Apply `runtime.threads`: by the environment before torch is loaded, by its own call after."""
    if recipe.runtime.threads is None:
        return
    os.environ["OMP_NUM_THREADS"] = str(recipe.runtime.threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(recipe.runtime.threads)
