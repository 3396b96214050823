"""The slow, obvious twin of selection: one pool at a time, plain Python, exact sums.

Nearness is compared with a tolerance of 1e-9 of the scores' size, because the fast path adds in another
order.
"""

import math
from fractions import Fraction

Row = tuple[str, str, int, float]  # prompt_id, language, sample_id, score


def pools_of(rows: list[Row], pool: str) -> dict[tuple, list[Row]]:
    pools: dict[tuple, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row[0].encode(), row[1].encode(), row[2])):
        key = (row[0],) if pool == "all" else (row[0], row[1])
        pools.setdefault(key, []).append(row)
    return pools


def target(members: list[Row], rule: str) -> float:
    scores = [Fraction(row[3]) for row in members]
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    if rule == "max":
        return float(max(scores))
    if rule == "min":
        return float(min(scores))
    if rule.startswith("mean"):
        return float(mean) - float(rule[5:].removesuffix("std") or 0) * std
    position = Fraction(1, 4) * (len(scores) - 1)  # q1, between two order statistics
    ordered = sorted(scores)
    below = math.floor(position)
    above = min(below + 1, len(scores) - 1)
    return float(ordered[below] + (position - below) * (ordered[above] - ordered[below]))


def pick(members: list[Row], aim: float) -> list[Row]:
    """The nearest members, all that tie within the tolerance, in key order; empty when there are no
    members.
    """
    if not members:
        return []
    slack = 1e-9 * max(1.0, *(abs(row[3]) for row in members))
    nearest = min(abs(row[3] - aim) for row in members)
    return [row for row in members if abs(row[3] - aim) <= nearest + slack]


def pairs(rows: list[Row], pool: str, rejected: str) -> dict[tuple, tuple[Row, list[Row]]]:
    """For every pool with a pair, the chosen row and the rows that may be the rejected one."""
    found = {}
    for key, members in pools_of(rows, pool).items():
        best = max(row[3] for row in members)
        chosen = next(row for row in members if row[3] == best)
        below = [row for row in members if row[3] < best]
        if below:
            found[key] = (chosen, pick(below, target(members, rejected)))
    return found
