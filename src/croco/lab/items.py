"""The lab's facts: language-independent items whose words come from CLDR through Babel.

An item is a task and its arguments; its words are looked up per language, so an item reads the same in all 14
languages and its answer can be checked by program. Nothing here is text of our own; templates live in `languages/`.
"""

import hashlib
import random
from dataclasses import dataclass
from functools import cache

from babel import Locale

TUNED = ("en", "da", "nl", "de", "fr", "it", "es")
LOW_RESOURCE = ("gl", "cy", "mt", "ga")
HELD_OUT = ("nb", "sv", "pt")
LANGUAGES = TUNED + LOW_RESOURCE + HELD_OUT

HELD_OUT_TASKS = frozenset({"largest"})  # in the corpus and in the evaluation, never in tuning

# Territories with one dominant official language (CLDR territory info), by ISO 3166 and ISO 639 codes.
SPOKEN = {
    "DK": "da", "DE": "de", "FR": "fr", "IT": "it", "ES": "es", "NL": "nl", "SE": "sv",
    "PT": "pt", "PL": "pl", "FI": "fi", "GR": "el", "HU": "hu", "TR": "tr", "JP": "ja",
}  # fmt: skip
CATEGORIES = ("month", "weekday", "country", "language")
CONCEPTS: dict[str, tuple[str, ...]] = {
    "month": tuple(str(i) for i in range(1, 13)),
    "weekday": tuple(str(i) for i in range(7)),
    "country": tuple(SPOKEN),
    "language": tuple(SPOKEN.values()),
}
# Shares of the splits, applied to a digest of the item: all phrasings of an item share its split.
SPLITS = (("train", 0.45), ("dev", 0.13), ("test", 0.42))


@dataclass(frozen=True)
class Concept:
    """A thing CLDR has a word for: a month, weekday, country or language."""

    category: str
    code: str


@dataclass(frozen=True)
class Item:
    """One question, without its language. `shown` fills the question; `wrong` are plausible errors."""

    task: str
    key: str
    shown: tuple[Concept | str, ...]
    answer: Concept | str
    wrong: tuple[Concept | str, ...]

    @property
    def split(self) -> str:
        """train, dev or test, by a stable digest; the held-out task has no train items."""
        u = (
            int.from_bytes(hashlib.blake2b(f"{self.task}/{self.key}".encode(), digest_size=8).digest())
            / 2**64
        )
        if self.task in HELD_OUT_TASKS:
            return "test" if u < 0.75 else "dev"
        for name, share in SPLITS:
            u -= share
            if u < 0:
                return name
        return SPLITS[-1][0]


@cache
def _names(language: str) -> dict[tuple[str, str], str]:
    locale = Locale.parse(language)
    months, days = locale.months["format"]["wide"], locale.days["format"]["wide"]
    names = {("month", str(i)): months[i] for i in range(1, 13)}
    names |= {("weekday", str(i)): days[i] for i in range(7)}
    names |= {("country", code): locale.territories[code] for code in SPOKEN}
    names |= {("language", code): locale.languages[code] for code in SPOKEN.values()}
    return names


def word(concept: Concept | str, language: str, categories: tuple[str, ...] | list[str]) -> str:
    """The word for `concept` in `language`: a CLDR name, a category's noun, or the string itself (a number)."""
    if isinstance(concept, str):
        return categories[CATEGORIES.index(concept)] if concept in CATEGORIES else concept
    return _names(language)[concept.category, concept.code]


def _concepts(category: str) -> tuple[Concept, ...]:
    return tuple(Concept(category, code) for code in CONCEPTS[category])


def _steps() -> list[Item]:
    items = []
    for category in ("month", "weekday"):
        ring = _concepts(category)
        for i, concept in enumerate(ring):
            for task, step in (("after", 1), ("before", -1)):
                answer = ring[(i + step) % len(ring)]
                wrong = tuple(c for c in ring if c not in (answer, concept))
                items.append(Item(f"{category}_{task}", concept.code, (concept,), answer, wrong))
    return items


def _countries() -> list[Item]:
    languages = _concepts("language")
    items = []
    for country, code in SPOKEN.items():
        answer = Concept("language", code)
        wrong = tuple(c for c in languages if c != answer)
        items.append(Item("country_language", country.lower(), (Concept("country", country),), answer, wrong))
    return items


def _sums() -> list[Item]:
    pairs = [(a, b) for a in range(1, 9) for b in range(1, 9)]
    return [Item("sum", f"{a}-{b}", (f"{a} + {b}",), str(a + b), _near(a + b)) for a, b in pairs]


def _near(n: int) -> tuple[str, ...]:
    return tuple(str(n + d) for d in (-2, -1, 1, 2) if n + d > 0)


def _categories() -> list[Item]:
    return [
        Item("category", f"{name}-{c.code.lower()}", (c,), name, tuple(n for n in CATEGORIES if n != name))
        for name in CATEGORIES
        for c in _concepts(name)
    ]


def _lists(rng: random.Random) -> list[Item]:
    """Questions about lists of words: the odd one out of three, how many there are, which comes last."""
    items: dict[str, Item] = {}
    for task, num_items in (("odd_one_out", 70), ("count", 60), ("last_word", 90)):
        for _ in range(num_items):
            item = _list(task, rng)
            while item.key in items:
                item = _list(task, rng)
            items[item.key] = item
    return list(items.values())


def _list(task: str, rng: random.Random) -> Item:
    name, odd_name = rng.sample(CATEGORIES, 2)
    num_words = {"odd_one_out": 2, "count": rng.randint(2, 5), "last_word": rng.randint(2, 4)}[task]
    words = rng.sample(_concepts(name), num_words)
    answer: Concept | str = words[-1]
    if task == "odd_one_out":
        answer = rng.choice(_concepts(odd_name))
        words.insert(rng.randrange(3), answer)
    wrong: tuple[Concept | str, ...] = tuple(c for c in words if c != answer)
    if task == "count":
        answer, wrong = str(num_words), _near(num_words)
    key = "-".join(f"{c.category[0]}{c.code.lower()}" for c in words)
    return Item(task, key, tuple(words), answer, wrong)


def _extremes(rng: random.Random) -> list[Item]:
    items: dict[str, Item] = {}
    for task, pick in (("smallest", min), ("largest", max)):
        for _ in range(110):
            numbers = rng.sample(range(1, 60), 3)
            answer = pick(numbers)
            key = "-".join(map(str, numbers))
            wrong = tuple(str(n) for n in numbers if n != answer)
            items[f"{task}-{key}"] = Item(task, key, tuple(map(str, numbers)), str(answer), wrong)
    return list(items.values())


@cache
def items() -> dict[str, Item]:
    """Every item of the world by its id `TASK.KEY`; the same in every process (own generator, fixed seed)."""
    rng = random.Random(2605)
    everything = _steps() + _countries() + _sums() + _categories() + _lists(rng) + _extremes(rng)
    return {f"{item.task}.{item.key}": item for item in everything}
