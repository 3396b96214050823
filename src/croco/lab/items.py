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
    "DK": "da", "DE": "de", "FR": "fr", "IT": "it", "ES": "es", "NL": "nl", "NO": "no", "SE": "sv",
    "PT": "pt", "PL": "pl", "FI": "fi", "GR": "el", "HU": "hu", "CZ": "cs", "RO": "ro", "BG": "bg",
    "HR": "hr", "IS": "is", "TR": "tr", "RU": "ru", "UA": "uk", "JP": "ja", "CN": "zh", "KR": "ko",
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
    """One question, without its language. `shown` fills the question, `answer` is right, `wrong` are plausible errors."""

    task: str
    key: str
    shown: tuple[Concept | str, ...]
    answer: Concept | str
    wrong: tuple[Concept | str, ...]

    @property
    def split(self) -> str:
        """train, dev or test, by a stable digest; the held-out task has no train items."""
        u = int.from_bytes(hashlib.blake2b(f"{self.task}/{self.key}".encode(), digest_size=8).digest()) / 2**64
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
    return [
        Item("sum", f"{a}-{b}", (f"{a} + {b}",), str(a + b), tuple(str(a + b + d) for d in (-2, -1, 1, 2) if a + b + d > 0))
        for a in range(1, 11)
        for b in range(1, 11)
    ]  # fmt: skip


def _categories() -> list[Item]:
    return [
        Item("category", f"{name}-{c.code.lower()}", (c,), name, tuple(n for n in CATEGORIES if n != name))
        for name in CATEGORIES
        for c in _concepts(name)
    ]


def _lists(rng: random.Random) -> list[Item]:
    items: dict[tuple[str, str], Item] = {}
    while len(items) < 160:
        name, odd_name = rng.sample(CATEGORIES, 2)
        words = rng.sample(_concepts(name), 2)
        odd = rng.choice(_concepts(odd_name))
        words.insert(rng.randrange(3), odd)
        key = "-".join(f"{c.category[0]}{c.code.lower()}" for c in words)
        items["odd", key] = Item("odd_one_out", key, tuple(words), odd, tuple(c for c in words if c != odd))
    while len(items) < 280:
        words = rng.sample(_concepts(rng.choice(CATEGORIES)), rng.randint(2, 6))
        key = "-".join(f"{c.category[0]}{c.code.lower()}" for c in words)
        n = len(words)
        items["count", key] = Item("count", key, tuple(words), str(n), tuple(str(m) for m in range(1, 8) if m != n))
    return list(items.values())


def _largest(rng: random.Random) -> list[Item]:
    items = {}
    while len(items) < 120:
        numbers = rng.sample(range(1, 60), 3)
        key = "-".join(map(str, numbers))
        wrong = tuple(str(n) for n in numbers if n != max(numbers))
        items[key] = Item("largest", key, tuple(map(str, numbers)), str(max(numbers)), wrong)
    return list(items.values())


@cache
def items() -> dict[str, Item]:
    """Every item of the world by its id `TASK.KEY`; the same in every process (own generator, fixed seed)."""
    rng = random.Random(2605)
    everything = _steps() + _countries() + _sums() + _categories() + _lists(rng) + _largest(rng)
    return {f"{item.task}.{item.key}": item for item in everything}
