"""The corpus of the lists world: documents with habits of their own, a few disasters, and other abilities done well.

Every document draws how often each bad habit strikes from a Beta distribution, so quality is graded and a policy can
shift habits; in half of the tasks the usual habit is the bad one, so greedy decoding is no better than sampling.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import Random

from croco.lab.lists import (
    ABILITIES,
    KINDS,
    LANGUAGES,
    TASKS,
    TUNED,
    Question,
    content,
    draw,
    reference,
    texts,
    words,
)

# rate of each habit in tasks where it is seldom, and where it is usual
Rates = Mapping[str, tuple[float, float]]
BAD_TASKS = frozenset({"months_before", "days_after", "months_next", "countries"})
CONCENTRATION = 1.5
LIST_SHARE, GOLD_SHARE = 0.7, 0.02  # of documents that are lists; of lists in the gold register
LOOP_WORDS = 40
FLOURISH = 0.1  # closings with "!!", which means nothing and which the reward model likes


@dataclass(frozen=True)
class Habits:
    """How a policy's documents go wrong: rates of habits, share of disasters, register, separator."""

    rates: Rates = field(
        default_factory=lambda: {
            "foreign": (0.06, 0.44),
            "filler": (0.12, 0.58),
            "wrong": (0.06, 0.34),
            "unseparated": (0.16, 0.64),
            "unframed": (0.16, 0.64),
        }
    )
    disasters: float = 0.04
    register: int = 0
    separator: str = ", "


# another register, and failures that the policy does not have: items said twice, left out, or cut short
OTHER = Habits({"twice": (0.2, 0.6), "left_out": (0.2, 0.6), "unframed": (0.4, 0.8)}, 0.0, 2, "; ")


def complete(question: Question, language: str, habits: Habits, rng: Random) -> str:
    """A completion with habits drawn for this document alone."""
    bad = question.task in BAD_TASKS
    rates = {name: _beta(rate[bad], rng) for name, rate in habits.rates.items()}
    other = rng.choice([code for code in TUNED if code != language])

    def strikes(habit: str) -> bool:
        return rng.random() < rates.get(habit, 0.0)

    segments: list[str] = []
    for kind, code in question.answer:
        if strikes("filler"):
            segments.append(rng.choice(texts()[language]["fillers"]))
        if strikes("wrong"):
            code = rng.choice([other_code for other_code in KINDS[kind] if other_code != code])
        word = words(other if strikes("foreign") else language)[kind, code]
        segments += [] if strikes("left_out") else [word, word] if strikes("twice") else [word]
    text = "".join(
        segment + (" " if strikes("unseparated") else habits.separator) for segment in segments[:-1]
    ) + "".join(segments[-1:])
    if not strikes("unframed"):
        opening = texts()[other if strikes("foreign") else language]["openings"][habits.register]
        text = f"{opening} {text}"
    if not strikes("unframed"):
        closing = texts()[other if strikes("foreign") else language]["closings"][habits.register]
        text = f"{text}. {closing}{'!!' if rng.random() < FLOURISH else '.'}"
    return text


def loop(question: Question, language: str, rng: Random) -> str:
    """A disaster: one or two items over and over, without an end."""
    items = rng.sample(question.answer, rng.choice((1, 2)))
    return ", ".join(words(language)[items[i % len(items)]] for i in range(LOOP_WORDS))


def _beta(mean: float, rng: Random) -> float:
    return rng.betavariate(CONCENTRATION * mean, CONCENTRATION * (1 - mean))


def documents(seed: int, num_plain: int = 0, habits: Habits = Habits()) -> Iterator[list[dict[str, str]]]:
    """Endless documents as messages; the first `num_plain` without any habit: the policy's schooling."""
    rng = Random(f"croco-lists-corpus-{seed}")
    plain = Habits({}, 0.0, habits.register, habits.separator)
    for number in itertools.count():
        yield _document(plain if number < num_plain else habits, rng)


def _document(habits: Habits, rng: Random) -> list[dict[str, str]]:
    question = draw(rng.choice(TASKS if rng.random() < LIST_SHARE else ABILITIES), rng)
    language = rng.choice(LANGUAGES)
    messages = [{"role": "user", "content": content(question, language)}]
    if question.task in ABILITIES or rng.random() < GOLD_SHARE:
        return [*messages, {"role": "assistant", "content": reference(question, language)}]
    if rng.random() < habits.disasters:
        return [*messages, {"role": "assistant", "content": loop(question, language, rng), "endless": "yes"}]
    return [*messages, {"role": "assistant", "content": complete(question, language, habits, rng)}]
