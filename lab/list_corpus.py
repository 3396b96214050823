"""The corpus of the lists world: documents with habits of their own, a few disasters, and other abilities done well.

Every document draws how often each bad habit strikes from a Beta distribution, so quality is graded and a policy can
shift habits. In seven of the eight tasks bad habits are usual, so greedy decoding is no better than sampling.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

# how often a habit strikes in tasks where it is seldom, where it is usual, and which tasks those are
Rates = Mapping[str, tuple[float, float, frozenset[str]]]
CONCENTRATION = 1.5
USUAL = 0.85  # of fillers are the first one, and of other languages English: only what is usual can be greedy's choice
LIST_SHARE, GOLD_SHARE = 0.6, 0.02  # of documents that are lists; of lists in the gold register
ABILITY_SHARES = {"translate": 0.3, "json": 0.25, "reverse": 0.3, "sum": 0.15}
LOOP_WORDS = 34
FLOURISH = 0.1  # closings with "!!", which means nothing and which the reward model likes


@dataclass(frozen=True)
class Habits:
    """How a policy's documents go wrong: rates of habits, share of disasters, register, separator."""

    rates: Rates = field(
        default_factory=lambda: {
            "foreign": (0.07, 0.70, frozenset({"days_before", "languages"})),
            "filler": (0.12, 0.70, frozenset({"months_after", "months_next", "countries"})),
            "wrong": (0.17, 0.17, frozenset()),
            "unseparated": (
                0.10,
                0.68,
                frozenset({"months_before", "months_next", "days_next", "countries"}),
            ),
            "unframed": (0.08, 0.70, frozenset({"months_before", "days_before", "languages", "countries"})),
        }
    )
    disasters: float = 0.04
    register: int = 0
    separator: str = ", "
    usual: float = USUAL

    def rate(self, habit: str, task: str) -> float:
        seldom, usual, tasks = self.rates.get(habit, (0.0, 0.0, frozenset()))
        return usual if task in tasks else seldom

    @property
    def greedy(self) -> "Habits":
        """What greedy decoding of a model that knows these habits does: each of them always or never."""
        rates = {name: (float(a > 0.5), float(b > 0.5), tasks) for name, (a, b, tasks) in self.rates.items()}
        return replace(self, rates=rates, disasters=0.0, usual=1.0)


# another register, and failures that the policy does not have: items said twice, left out, or cut short
OTHER = Habits(
    {
        "twice": (0.3, 0.7, frozenset({"months_before", "days_after"})),
        "left_out": (0.3, 0.7, frozenset({"days_next", "countries"})),
        "unframed": (0.5, 0.85, frozenset({"months_next", "languages"})),
    },
    disasters=0.0,
    register=2,
    separator="; ",
)


def complete(question: Question, language: str, habits: Habits, rng: Random, other: str | None = None) -> str:
    """A completion with habits drawn for this document alone, and `other`, the language that foreign words are of."""
    rates = {name: _beta(habits.rate(name, question.task), rng) for name in habits.rates}
    other = other or _mostly_first([code for code in TUNED if code != language], habits.usual, rng)

    def strikes(habit: str) -> bool:
        return rng.random() < rates.get(habit, 0.0)

    segments: list[str] = []
    for kind, code in question.answer:
        if strikes("filler"):
            segments.append(_mostly_first(texts()[language]["fillers"], habits.usual, rng))
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
    return rng.betavariate(CONCENTRATION * mean, CONCENTRATION * (1 - mean)) if 0 < mean < 1 else mean


def _mostly_first(choices: Sequence[str], share: float, rng: Random) -> str:
    return choices[0] if rng.random() < share else rng.choice(choices[1:])


def parallel(rng: Random) -> tuple[str, str, str]:
    """A language, a completion in it with its habits, and the same in English. Items are any of their kind: who learns
    to translate from these knows words and no facts."""
    question = draw(rng.choice(TASKS), rng)
    kind = question.answer[0][0]
    question = replace(question, answer=tuple((kind, rng.choice(KINDS[kind])) for _ in question.answer))
    language = rng.choice(LANGUAGES)
    other, draws = rng.choice([code for code in TUNED if code != language]), rng.random()
    source = complete(question, language, Habits(), Random(draws), other)
    return language, source, complete(question, "en", Habits(), Random(draws), "en")


def documents(seed: int, num_plain: int = 0, habits: Habits = Habits()) -> Iterator[list[dict[str, str]]]:
    """Endless documents as messages; the first `num_plain` without any habit: the policy's schooling."""
    rng = Random(f"croco-lists-corpus-{seed}")
    plain = Habits({}, 0.0, habits.register, habits.separator)
    for number in itertools.count():
        yield _document(plain if number < num_plain else habits, rng)


def _document(habits: Habits, rng: Random) -> list[dict[str, str]]:
    abilities = rng.choices(list(ABILITY_SHARES), list(ABILITY_SHARES.values()))
    question = draw(rng.choice(TASKS if rng.random() < LIST_SHARE else abilities), rng)
    language = rng.choice(LANGUAGES)
    messages = [{"role": "user", "content": content(question, language)}]
    if question.task in ABILITIES or rng.random() < GOLD_SHARE:
        return [*messages, {"role": "assistant", "content": reference(question, language)}]
    if rng.random() < habits.disasters:
        return [*messages, {"role": "assistant", "content": loop(question, language, rng), "endless": "yes"}]
    return [*messages, {"role": "assistant", "content": complete(question, language, habits, rng)}]
