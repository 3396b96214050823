"""Verdicts for the lab: every completion checked by program against the world's facts.

Two benchmarks come out of one set of test prompts: "lab" for the tasks that were in tuning,
"lab-held-out-task" for those that never were. What makes a completion good is the world's business
(`croco.lab.world`).
"""

from __future__ import annotations

from collections.abc import Sequence

from croco.lab import world

BENCHMARK = "lab"
HELD_OUT_BENCHMARK = "lab-held-out-task"
USABLE = ("good", "terse", "rambling")


def benchmark(domain: str | None) -> str:
    """The benchmark a prompt of this domain (task) belongs to."""
    return HELD_OUT_BENCHMARK if domain in world.HELD_OUT_TASKS else BENCHMARK


def judge(
    prompt_ids: Sequence[str], languages: Sequence[str], completions: Sequence[str]
) -> tuple[list[str], list[float]]:
    """Mode and value (1.0 when good, else 0.0) of each completion."""
    verdicts = [world.verify(*row) for row in zip(prompt_ids, languages, completions, strict=True)]
    return [verdict.mode for verdict in verdicts], [float(verdict.good) for verdict in verdicts]


def compare(prompt_id: str, language: str, first: str, second: str) -> str:
    """The judgement of a judge that can check: a good completion beats one that is correct but terse or rambling, which
    beats all others; in the words a model judge would use, so that it is read the same way.
    """
    both = [world.verify(prompt_id, language, text) for text in (first, second)]
    one, two = ((verdict.correct and verdict.mode in USABLE) + verdict.good for verdict in both)
    verdict = "tie" if one == two else "1" if one > two else "2"
    return f"1 is {both[0].mode}, 2 is {both[1].mode}.\nVerdict: {verdict}"
