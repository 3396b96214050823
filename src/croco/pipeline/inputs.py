"""What each stage reads from the others, and for which arms it runs; the stages themselves are in `graph.py`."""

from croco.config.recipe import Recipe
from croco.pipeline import arms
from croco.pipeline.node import Reference


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
    greedy = 0.0 in evaluation.temperatures and recipe.arena.temperature == 0
    same = greedy and limit in (None, evaluation.max_new_tokens)
    return [] if same and not recipe.arena.source else arms.evaluated_arms(recipe)


def compared_from(recipe: Recipe, arm: str | None) -> list[Reference]:
    """What an arm's comparisons are made of: prompts, and the completions of the base and of the arm."""
    drawn = "arena-sample" if arena_sampled(recipe) else "evaluate"
    return [arena_prompts_of(recipe), (drawn, "base"), (drawn, arm)]


# a translated table takes the place of the one it was made from, under the same name
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


def summed_from(recipe: Recipe, arm: str | None) -> list[Reference]:
    parts = [("evaluate", arms.evaluated_arms), ("euroeval", euroeval_arms), ("arena", arena_arms)]
    return [eval_prompts_of(recipe), *((stage, name) for stage, of in parts for name in of(recipe))]


def shown_from(recipe: Recipe, arm: str | None) -> list[Reference]:
    parts = [
        ("sample", arms.sampling_arms),
        ("score", arms.scoring_arms),
        ("pair", arms.tuned_arms),
        ("train", arms.tuned_arms),
    ]
    made = [(stage, name) for stage, of in parts for name in of(recipe)]
    return [prompts_of(recipe), eval_prompts_of(recipe), *made, ("results", None)]
