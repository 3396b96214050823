"""The words in which a recipe says how a pair is chosen: selection rules, pools, calibrations. No numbers are touched.

A rule names a target score; the completion nearest to it is picked. It is plain text so that a table's metadata, a
command line and a recipe say it alike. The recipe reads this file, so it imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from croco.errors import UserError

CALIBRATIONS = ("none", "zscore", "quantile", "centred", "length")
PROMPTS = ("chosen", "rejected", "random", "each")

_NUMBER = r"\d+(?:\.\d+)?"
_MEAN = re.compile(rf"mean(?:([+-])({_NUMBER})\*?std)?")
_QUANTILE = re.compile(rf"quantile:({_NUMBER})")
_GAP = re.compile(rf"gap:({_NUMBER})")
_FORMS = '"mean", "mean-K*std", "mean+K*std", "quantile:Q", "q1"'


@dataclass(frozen=True)
class Rule:
    """A target score: `kind` is "max", "min", "mean", "quantile", "gap", "reference" or "none".

    `amount` is the number of population standard deviations from the mean, the quantile in [0, 1], or the distance
    below the chosen score.
    """

    kind: str
    amount: float = 0.0


def parse_chosen(text: str) -> Rule:
    """The rule of the chosen completion: a target score, or "reference" (the gold completion). Raises UserError."""
    if text == "reference":
        return Rule(text)
    rule = _target(text)
    if rule is None or rule.kind == "min":
        raise UserError(f'the rule "{text}" for chosen is unknown, expected "max", {_FORMS} or "reference"')
    return rule


def parse_rejected(text: str) -> Rule:
    """The rule of the rejected completion: a target score, "gap:X" (X below the chosen), or "none" (data for SFT).

    Raises UserError for anything else.
    """
    if text == "none":
        return Rule(text)
    if match := _GAP.fullmatch(text):
        return Rule("gap", float(match[1]))
    rule = _target(text)
    if rule is None or rule.kind == "max":
        raise UserError(
            f'the rule "{text}" for rejected is unknown, expected "min", {_FORMS}, "gap:X" or "none"'
        )
    return rule


def check_groups(pool: str | Mapping[str, Sequence[str]], languages: Sequence[str]) -> dict[str, str]:
    """The group of each language that is in one; raises UserError for an unknown pool, an empty group, a language in
    two groups, and a group named like a language that is in none.
    """
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


def _target(text: str) -> Rule | None:
    if text in ("max", "min"):
        return Rule(text)
    if text == "q1":
        return Rule("quantile", 0.25)
    if match := _MEAN.fullmatch(text):
        sign = -1.0 if match[1] == "-" else 1.0
        return Rule("mean", sign * float(match[2]) if match[2] else 0.0)
    if (match := _QUANTILE.fullmatch(text)) and float(match[1]) <= 1.0:
        return Rule("quantile", float(match[1]))
    return None
