"""`[study]` of the recipe: the whole experiment under several seeds, and the claims that its page judges."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from croco.config.arms import Completions, Name
from croco.config.runtime import Positive, Section, Seed

GROUPS = ("tuned", "low-resource", "held-out", "all")
BASE = "base"


class Comparison(Section):
    """One arm beside another, on some languages: the difference that a claim speaks of."""

    arm: Name
    """The arm that is looked at; with `at_equal` a sweep."""
    than: Name = BASE
    """What it is compared with; with `at_equal` a sweep."""
    at_best: bool = False
    """`than` at its best temperature, on these very prompts; the base's headline is."""
    at_equal: Name | None = None
    """"kl" or a benchmark: both sweeps, each with the base, as curves over it, at the highest that both reach."""
    beyond: Annotated[tuple[Name, ...], Field(strict=False, min_length=2, max_length=2)] | None = None
    """Two more arms, whose difference is subtracted: does the first difference go beyond it (an interaction)?"""
    share: Annotated[float, Field(gt=0)] = 1.0
    """Of the gain of `than` over the base, that `arm` is to reach."""
    on: Annotated[tuple[str, ...], Field(strict=False)] = ("tuned",)
    """Groups or languages, each a test of its own."""
    temperatures: Annotated[tuple[float, ...], Field(strict=False)] = ()
    """None named is all of evaluation.temperatures."""
    benchmark: str = "lab"
    """Of the results table."""
    metric: str | None = None
    """"good" or "score" if not given; "mode:wrong-language", …"""
    want: Literal["higher", "lower", "not higher", "not lower"] = "higher"
    """What the claim says of the difference."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """In the metric's own units."""

    @model_validator(mode="after")
    def _one_form(self) -> Comparison:
        if sum((self.at_best, self.at_equal is not None, self.beyond is not None, self.share != 1)) > 1:
            raise ValueError("expected only one of at_best, at_equal, beyond and share in a comparison")
        return self


class Claim(Section):
    """What is claimed, the comparisons that decide it, and why it came out as it did (written once it has)."""

    says: str
    """The claim, as the page shows it."""
    tests: Annotated[tuple[Comparison, ...], Field(strict=False, min_length=1)]
    """The comparisons that decide it."""
    need: Literal["all", "most"] = "all"
    """How many of the tests."""
    secondary: bool = False
    """Corrected for several claims among the secondary ones."""
    not_testable: str = ""
    """Why these data cannot decide it: it gets no verdict."""
    why: str = ""
    """Why it came out as it did, written once it has."""


class Transfer(Section):
    """Does the reward model rank within a language as well as the verified truth? In every evaluated language."""

    split: str = "dev"
    """Of the lab's prompts."""
    limit: Positive | None = None
    """Prompts per language."""
    completions: Completions = 16
    """Of each prompt."""


class Study(Section):
    """The recipe's experiment once a seed, each in a folder of its own, and one page over all of them."""

    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = (0, 1, 2)
    """Each runs the whole experiment."""
    transfer: Transfer | None = None
    """Of the lab only."""
    equivalence: Annotated[float, Field(gt=0)] = 0.02
    """Differences within ± this are of no interest."""
    claims: dict[Name, Claim] = Field(default_factory=dict)
    """By name, in the page's order."""
    settings: dict[Name, str] = Field(default_factory=dict)
    """Of an arm or a sweep: when its settings were chosen, and on what."""
    introduction: str = ""
    """The page's first paragraph."""
    remarks: dict[str, str] = Field(default_factory=dict)
    """A paragraph for a part of the page, by its name."""

    @model_validator(mode="after")
    def _seeds_differ(self) -> Study:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)}: expected different ones")
        return self
