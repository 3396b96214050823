"""The slow, obvious twin of the contrast: one pool at a time, plain Python, exact sums, texts compared as texts.

Nearness is compared with a tolerance of 1e-9 of the scores' size, because the fast path adds in another order: the twin
gives all rows that may be the rejected one.
"""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Row:
    prompt_id: str
    language: str
    sample_id: int
    score: float
    completion: str = ""
    finish_reason: str = "stop"


def candidates(rows: list[Row]) -> tuple[list[Row], dict[tuple, str]]:
    """The rows that may be picked, and why the others may not."""
    kept: list[Row] = []
    dropped: dict[tuple, str] = {}
    seen: dict[tuple, tuple[set[str], set[str]]] = {}
    for row in sorted(rows, key=lambda row: (row.prompt_id, row.language, row.sample_id)):
        texts, normals = seen.setdefault((row.prompt_id, row.language), (set(), set()))
        reason = None
        if not math.isfinite(row.score):
            reason = "score is not finite"
        elif normal(row.completion) == "":
            reason = "completion is empty"
        elif row.finish_reason == "length":
            reason = "cut at the token limit"
        elif row.completion in texts:
            reason = "duplicate of an earlier completion"
        else:
            texts.add(row.completion)
            if normal(row.completion) in normals:
                reason = "near duplicate of an earlier completion"
            normals.add(normal(row.completion))
        if reason:
            dropped[row.prompt_id, row.language, row.sample_id] = reason
        else:
            kept.append(row)
    return kept, dropped


def normal(text: str) -> str:
    return " ".join("".join(c for c in text if unicodedata.category(c) != "Cf").lower().split())


def pools_of(rows: list[Row], pool: str | dict[str, list[str]]) -> dict[tuple, list[Row]]:
    pools: dict[tuple, list[Row]] = {}
    for row in rows:
        group = row.language
        if pool == "all":
            group = "all"
        elif isinstance(pool, dict):
            group = next((name for name, codes in pool.items() if row.language in codes), row.language)
        pools.setdefault((row.prompt_id, group), []).append(row)
    # of equally near rows the first by sample_id wins, then by language
    return {
        key: sorted(members, key=lambda row: (row.sample_id, row.language)) for key, members in pools.items()
    }


def target(members: list[Row], rule: str, chosen_score: float = 0.0) -> float:
    scores = [Fraction(row.score) for row in members]
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    if rule == "max":
        return float(max(scores))
    if rule == "min":
        return float(min(scores))
    if rule.startswith("gap:"):
        return chosen_score - float(rule[4:])
    if rule.startswith("mean"):
        return float(mean) + float(rule[4:].replace("*", "").removesuffix("std") or 0) * std
    share = Fraction(1, 4) if rule == "q1" else Fraction(rule.removeprefix("quantile:"))
    position = share * (len(scores) - 1)  # between two order statistics
    ordered = sorted(scores)
    below = math.floor(position)
    above = min(below + 1, len(scores) - 1)
    return float(ordered[below] + (position - below) * (ordered[above] - ordered[below]))


def pick(members: list[Row], aim: float) -> list[Row]:
    """The nearest members, all that tie within the tolerance, in their order."""
    if not members:
        return []
    slack = 1e-9 * max(1.0, abs(aim), *(abs(row.score) for row in members))
    nearest = min(abs(row.score - aim) for row in members)
    return [row for row in members if abs(row.score - aim) <= nearest + slack]


def pair(members: list[Row], chosen: str, rejected: str) -> tuple[list[Row], list[Row]]:
    """The rows that may be chosen, and those that may be rejected if the first of them is; empty without a pair."""
    first = pick(members, target(members, chosen))
    below = [row for row in members if row.score < first[0].score]
    return first, pick(below, target(members, rejected, first[0].score))
