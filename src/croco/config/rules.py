"""The words in which a recipe says how a pair is chosen: selection rules, pools, calibrations.

A rule names a target score; the completion nearest to it is picked. A new rule is a new line in FORMS."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from croco.errors import UserError

CALIBRATIONS = ("none", "zscore", "quantile", "centred", "length")
PROMPTS = ("chosen", "rejected", "random", "each")


class PoolScores(Protocol):
    """What a rule may ask of P pools, each as float64 (P,)."""

    @property
    def max(self) -> Any: ...
    @property
    def min(self) -> Any: ...
    @property
    def mean(self) -> Any: ...
    @property
    def std(self) -> Any: ...  # of the population
    def quantile(self, share: float) -> Any: ...


@dataclass(frozen=True)
class Form:
    """One kind of rule: how it is written, for which sides, and the score it aims at in every pool.

    `target` takes the pools, the amount and the chosen scores (P,); a rule without one picks no completion of the pool.
    `default` is the amount of a rule written without a number."""

    written: str
    pattern: str
    sides: tuple[str, ...] = ("chosen", "rejected")
    target: Callable[[PoolScores, float, Any], Any] | None = None
    default: float = 0.0


_NUMBER = r"\d+(?:\.\d+)?"
FORMS = {
    "max": Form('"max"', "max", ("chosen",), lambda pools, amount, chosen: pools.max),
    "min": Form('"min"', "min", ("rejected",), lambda pools, amount, chosen: pools.min),
    # so many population standard deviations from the mean
    "mean": Form(
        '"mean", "mean-K*std", "mean+K*std"',
        rf"mean(?:([+-]{_NUMBER})\*?std)?",
        target=lambda pools, amount, chosen: pools.mean + amount * pools.std,
    ),
    "quantile": Form(
        '"quantile:Q", "q1"',
        r"quantile:(0(?:\.\d+)?|1(?:\.0+)?)|q1",
        target=lambda pools, amount, chosen: pools.quantile(amount),
        default=0.25,
    ),
    # so far below the chosen score
    "gap": Form('"gap:X"', f"gap:({_NUMBER})", ("rejected",), lambda pools, amount, chosen: chosen - amount),
    "reference": Form('"reference" (the gold completion)', "reference", ("chosen",)),
    "none": Form('"none" (data for SFT)', "none", ("rejected",)),
}


@dataclass(frozen=True)
class Rule:
    """A kind of FORMS and its number, such as ("mean", -2.0)."""

    kind: str
    amount: float = 0.0

    def target(self, pools: PoolScores, chosen: Any = None) -> Any:
        """The score aimed at in every pool, float64 (P,), given the chosen scores; None when no completion is."""
        target = FORMS[self.kind].target
        return None if target is None else target(pools, self.amount, chosen)


def parse_chosen(text: str) -> Rule:
    """The rule of the chosen completion. Raises UserError for an unknown one."""
    return _parse(text, "chosen")


def parse_rejected(text: str) -> Rule:
    """The rule of the rejected completion. Raises UserError for an unknown one."""
    return _parse(text, "rejected")


def _parse(text: str, side: str) -> Rule:
    forms = {kind: form for kind, form in FORMS.items() if side in form.sides}
    for kind, form in forms.items():
        if match := re.fullmatch(form.pattern, text):
            amount = match[1] if match.re.groups and match[1] else form.default
            return Rule(kind, float(amount))
    known = ", ".join(form.written for form in forms.values())
    raise UserError(f'the rule "{text}" for {side} is unknown, expected one of {known}')


def check_groups(pool: str | Mapping[str, Sequence[str]], languages: Sequence[str]) -> dict[str, str]:
    """The group of each language that is in one; raises UserError for an unknown pool, an empty group, a language in
    two groups, and a group named like a language that is in none."""
    if isinstance(pool, str):
        if pool not in ("all", "language"):
            raise UserError(
                f'the pool "{pool}" is unknown, expected "language", "all" or a table of named groups'
            )
        return {}
    if not pool:
        raise UserError('the pool has no groups, expected such as { nordic = ["da", "sv"] }')
    owner: dict[str, str] = {}
    for name, members in pool.items():
        if not members:
            raise UserError(f"the group {name} is empty, expected languages")
        for code in members:
            if code in owner:
                raise UserError(f"'{code}' is in the groups {owner[code]} and {name}, expected it in one")
            owner[code] = name
    for name in pool:
        if name in languages and name not in owner:
            raise UserError(f"the group {name} has the name of a language in no group, expected another name")
    return owner
