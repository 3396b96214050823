"""What arms share: whose completions an arm reads, whose scores, and which stages run for which arm.

Completions of one policy on the same prompts are sampled once, scores of one scorer computed once; what two arms need
lives in the folder of the first of them, what only the base and the reward model make in no arm's."""

from collections.abc import Callable, Hashable

from croco.config.arms import ENGLISH, Arm, Contrast
from croco.config.recipe import Recipe
from croco.pipeline.node import Reference
from croco.storage.hashing import canonical


def arm_of(recipe: Recipe, arm: str | None) -> Arm:
    """The arm's section; "base" and the stages shared by all arms have none."""
    assert arm is not None
    return recipe.arms[arm]


def tuned_arms(recipe: Recipe) -> list[str | None]:
    return list(recipe.arms)


def evaluated_arms(recipe: Recipe) -> list[str | None]:
    return ["base", *recipe.evaluated_arms]


def contrasted(arm: Contrast) -> bool:
    """Whether an arm reads completions at all: data for SFT on gold completions needs the prompts alone."""
    return (arm.chosen, arm.rejected) != ("reference", "none")


def _samples(arm: Arm) -> Hashable:
    """What tells one table of completions from another; None is the base's, over all prompts."""
    if arm.start is None and arm.sampler is None:
        return None
    sampler = arm.sampler.model_dump(mode="json") if arm.sampler else None
    return canonical([arm.start, arm.part if arm.start else None, sampler])


def _scores(arm: Arm) -> Hashable:
    implicit = arm.implicit.model_dump(mode="json") if arm.implicit else None
    reward = arm.reward.model_dump(mode="json") if arm.reward else None
    return _samples(arm), arm.scorer, canonical([implicit, reward])


def sharing(recipe: Recipe, owner: str | None) -> list[Arm]:
    """The arms whose completions lie in the folder of this one."""
    wanted = None if owner is None else _samples(recipe.arms[owner])
    return [arm for arm in recipe.arms.values() if contrasted(arm) and _samples(arm) == wanted]


def samples_of(recipe: Recipe, arm: str | None) -> Reference:
    """The stage that samples what an arm chooses from."""
    wanted = _samples(arm_of(recipe, arm))
    if wanted is None:
        return ("sample", None)
    return ("sample", next(n for n, a in recipe.arms.items() if contrasted(a) and _samples(a) == wanted))


def scores_of(recipe: Recipe, arm: str | None) -> Reference:
    """The stage that scores what an arm chooses from."""
    wanted = _scores(arm_of(recipe, arm))
    if wanted == (None, "reward", canonical([None, None])):
        return ("score", None)
    return ("score", next(n for n, a in recipe.arms.items() if contrasted(a) and _scores(a) == wanted))


def sampling_arms(recipe: Recipe) -> list[str | None]:
    """None for the base's completions, shared; an arm that first needs others has them in its own folder."""
    return _first_of(recipe, samples_of) or [None]


def scoring_arms(recipe: Recipe) -> list[str | None]:
    """None for the reward model's scores of the shared completions; every other scoring has an arm's folder."""
    return _first_of(recipe, scores_of)


def _first_of(recipe: Recipe, of: Callable[[Recipe, str], Reference]) -> list[str | None]:
    owners = {of(recipe, name)[1] for name, arm in recipe.arms.items() if contrasted(arm)}
    shared: list[str | None] = [None] if None in owners else []
    return shared + [name for name in recipe.arms if name in owners]


def gold_arms(recipe: Recipe) -> list[str | None]:
    """One run, shared, where an arm sets gold completions against the policy's and so needs their scores."""
    needed = any(arm.chosen == "reference" and arm.rejected != "none" for arm in recipe.arms.values())
    return [None] if needed else []


def num_completions(recipe: Recipe, owner: str | None) -> int:
    """Completions per prompt that a sampling stage draws: of an arm's own, as many as any arm of it wants."""
    if owner is None:
        return recipe.sampling.completions
    return max(arm.completions or recipe.sampling.completions for arm in sharing(recipe, owner))


def num_scored(recipe: Recipe, owner: str | None) -> int | None:
    """Completions per prompt that a scoring stage looks at, the first ones; None is all that were sampled."""
    if owner is None:
        return None
    scores, (_, sampler) = _scores(recipe.arms[owner]), samples_of(recipe, owner)
    readers = [arm for arm in recipe.arms.values() if contrasted(arm) and _scores(arm) == scores]
    wanted = max(arm.completions or num_completions(recipe, sampler) for arm in readers)
    return wanted if wanted < num_completions(recipe, sampler) else None


def sampled_languages(recipe: Recipe, owner: str | None) -> tuple[str, ...]:
    """The languages that a sampling stage asks in: of an arm's own, those that any arm of it is tuned on."""
    arms = sharing(recipe, owner)
    wanted = {code for arm in arms for code in recipe.languages_of(arm)}
    if any(arm.scorer == "alignment" for arm in arms):
        wanted.add(ENGLISH)  # what the others are held against
    return tuple(code for code in recipe.run.languages if owner is None or code in wanted)


def num_rounds_before(recipe: Recipe, arm: str | None) -> int:
    """How many arms were tuned one after the other before this one begins."""
    count, before = 0, arm_of(recipe, arm).start
    while before is not None:
        count, before = count + 1, recipe.arms[before].start
    return count
