"""Verdicts for the lab: every completion checked by program against the facts of its world.

Two benchmarks come out of one set of test prompts: "lab" for the tasks that were in tuning, and
"lab-held-out-task" or "lab-abilities" for those that never were. What makes a completion good is the business of the
prompt's world: `croco.lab.world`, or `croco.lab.list_verdicts`, which grades.
"""

from __future__ import annotations

from collections.abc import Sequence

from croco.lab import list_verdicts, lists, world

BENCHMARK = "lab"
HELD_OUT_BENCHMARK = "lab-held-out-task"
ABILITIES_BENCHMARK = "lab-abilities"
USABLE = ("good", "terse", "rambling")


def benchmark(domain: str | None) -> str:
    """The benchmark a prompt of this domain (task) belongs to."""
    if domain and domain.startswith("ability-"):
        return ABILITIES_BENCHMARK
    return HELD_OUT_BENCHMARK if domain in world.HELD_OUT_TASKS else BENCHMARK


def verify(prompt_id: str, language: str, completion: str) -> world.Verdict | list_verdicts.Verdict:
    """The verdict of the world that the prompt is of."""
    return (list_verdicts if prompt_id in lists.questions() else world).verify(
        prompt_id, language, completion
    )


def prompt(prompt_id: str, language: str) -> str:
    """The text of a prompt of either world."""
    return (lists if prompt_id in lists.questions() else world).prompt(prompt_id, language)


def judge(
    prompt_ids: Sequence[str], languages: Sequence[str], completions: Sequence[str]
) -> tuple[list[str], list[float]]:
    """Mode and quality in [0, 1] of each completion; in the first world it is 1 when good, else 0."""
    verdicts = [verify(*row) for row in zip(prompt_ids, languages, completions, strict=True)]
    return [verdict.mode for verdict in verdicts], [verdict.quality for verdict in verdicts]


def compare(prompt_id: str, language: str, first: str, second: str) -> str:
    """The judgement of a judge that can check: a good completion beats one that is correct but terse or rambling, which
    beats all others; in the words a model judge would use, so that it is read the same way.
    """
    both = [verify(prompt_id, language, text) for text in (first, second)]
    one, two = map(_worth, both)
    verdict = "tie" if one == two else "1" if one > two else "2"
    return f"1 is {both[0].mode}, 2 is {both[1].mode}.\nVerdict: {verdict}"


def _worth(verdict: world.Verdict | list_verdicts.Verdict) -> float:
    if isinstance(verdict, list_verdicts.Verdict):
        return verdict.quality
    return (verdict.correct and verdict.mode in USABLE) + verdict.good
