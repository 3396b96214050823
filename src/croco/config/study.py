"""`[study]` of the recipe: the whole experiment under several seeds, and the claims that its page judges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from croco.config.arms import Completions
from croco.config.runtime import Positive, Section, Seed

if TYPE_CHECKING:
    from croco.config.recipe import Recipe

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]
GROUPS = ("tuned", "low-resource", "held-out", "all")
BASE = "base"


class Comparison(Section):
    """One arm beside another, on some languages: the difference that a claim speaks of."""

    arm: Name
    than: Name = BASE
    at_best: bool = False  # `than` at its best temperature, on these very prompts; the base's headline is
    on: Annotated[tuple[str, ...], Field(strict=False)] = (
        "tuned",
    )  # groups or languages, each a test of its own
    temperatures: Annotated[
        tuple[float, ...], Field(strict=False)
    ] = ()  # () is all of evaluation.temperatures
    benchmark: str = "lab"
    metric: str | None = None  # "good" or "score" if not given; "mode:wrong-language", …
    want: Literal["higher", "lower", "not higher", "not lower"] = "higher"
    margin: Annotated[float, Field(ge=0)] = 0.0  # in the metric's own units


class Claim(Section):
    """What is claimed, the comparisons that decide it, and why it came out as it did (written once it has)."""

    says: str
    tests: Annotated[tuple[Comparison, ...], Field(strict=False, min_length=1)]
    need: Literal["all", "most"] = "all"  # of the tests
    secondary: bool = False  # corrected for several claims among the secondary ones
    not_testable: str = ""  # why these data cannot decide it: it gets no verdict
    why: str = ""


class Transfer(Section):
    """Does the reward model rank within a language as well as the verified truth? In every evaluated language."""

    split: str = "dev"
    limit: Positive | None = None
    completions: Completions = 16


class Study(Section):
    """The recipe's experiment once a seed, each in a folder of its own, and one page over all of them."""

    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = (0, 1, 2)
    transfer: Transfer | None = None  # of the lab only
    equivalence: Annotated[float, Field(gt=0)] = 0.02  # differences within ± this are of no interest
    claims: dict[Name, Claim] = Field(default_factory=dict)
    introduction: str = ""
    remarks: dict[str, str] = Field(default_factory=dict)  # a paragraph for a part of the page, by its name

    @model_validator(mode="after")
    def _seeds_differ(self) -> Study:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)}: expected different ones")
        return self


def check_study(recipe: Recipe) -> None:
    """Raise ValueError for a claim about an arm, language or temperature that the recipe does not have."""
    assert recipe.study is not None
    arms, run = (BASE, *recipe.evaluated_arms), recipe.run
    if recipe.study.transfer and recipe.prompts.source != "lab":
        raise ValueError("study.transfer needs verified completions: expected prompts.source = 'lab'")
    for name, claim in recipe.study.claims.items():
        for number, test in enumerate(claim.tests, start=1):
            where = f"study.claims.{name}, test {number}"
            for arm in (test.arm, test.than):
                if arm not in arms:
                    raise ValueError(f"{where}: '{arm}' is not evaluated, expected one of {', '.join(arms)}")
            for scope in test.on:
                if scope not in (*GROUPS, *run.evaluated):
                    raise ValueError(
                        f"{where}: on = '{scope}', expected a group ({', '.join(GROUPS)}) or a language"
                    )
            for temperature in test.temperatures:
                if temperature not in recipe.evaluation.temperatures:
                    raise ValueError(f"{where}: temperature {temperature} is not in evaluation.temperatures")
