"""The second world of the lab: lists of five to ten items, whose quality a program measures in [0, 1].

A prompt asks for months, weekdays, countries or languages, in the order that makes them right. Four other abilities
(translating a word, repeating JSON, reversing, adding) are there to be forgotten. Words come from CLDR, everything else
from `lists.toml`. How a completion is judged is `list_verdicts.py`."""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import pyarrow as pa
from babel import Locale

from croco.storage.schemas import PROMPTS

SOURCE = "lab:lists"
TUNED, HELD_OUT = ("en", "de", "fr", "es"), ("it", "nl")
LANGUAGES = TUNED + HELD_OUT
TASKS = (
    "months_after", "months_before", "days_after", "days_before",
    "months_next", "days_next", "languages", "countries",
)  # fmt: skip
ABILITIES = ("translate", "json", "reverse", "sum")
# the first world has a task "sum" too
DOMAINS = {task: task for task in TASKS} | {task: f"ability-{task}" for task in ABILITIES}
SPOKEN = {
    "DE": "de", "FR": "fr", "IT": "it", "ES": "es", "PT": "pt",
    "PL": "pl", "HU": "hu", "TR": "tr", "JP": "ja", "FI": "fi",
}  # fmt: skip
KINDS = {
    "month": tuple(str(i) for i in range(1, 13)),
    "day": tuple(str(i) for i in range(7)),
    "country": tuple(SPOKEN),
    "language": tuple(SPOKEN.values()),
}
# prompts a task, or an ability, has in each split
SIZES = {"train": (15, 0), "dev": (6, 6), "test": (19, 15)}
Thing = tuple[str, str]  # kind and code, such as ("month", "5")


@dataclass(frozen=True)
class Question:
    """What is asked, without its language: `given` fills the prompt, `answer` are the items that are right."""

    task: str
    given: tuple[Thing, ...]
    answer: tuple[Thing, ...]
    text: str = ""  # of json: the text to repeat; of translate: the language; of sum: the numbers

    @property
    def key(self) -> str:
        codes = "-".join(code.lower() for _, code in self.given)
        return f"{self.task}.{codes}{self.text and '-' + self.text}.{len(self.answer)}"


# Words ------------------------------------------------------------------------------------------------------------


@cache
def texts() -> dict[str, dict]:
    """The sentences of every language, as the TOML file has them."""
    return tomllib.loads((Path(__file__).parent / "lists.toml").read_text(encoding="utf-8"))


@cache
def words(language: str) -> dict[Thing, str]:
    """CLDR's word for everything that can be in a list."""
    locale = Locale.parse(language)
    months, days = locale.months["format"]["wide"], locale.days["format"]["wide"]
    named = {"month": months, "day": days, "country": locale.territories, "language": locale.languages}
    return {
        (kind, code): named[kind][int(code) if code.isdigit() else code]
        for kind, codes in KINDS.items()
        for code in codes
    }


def say(things: Sequence[Thing], language: str) -> str:
    return ", ".join(words(language)[thing] for thing in things)


# Questions --------------------------------------------------------------------------------------------------------


def draw(task: str, rng: Random) -> Question:
    """A question of a task or an ability, at random."""
    kind = task.split("_")[0].rstrip("s")
    codes = KINDS.get(kind, ())
    if task.endswith(("_after", "_before")):
        step = 1 if task.endswith("_after") else -1
        start, n = rng.randrange(len(codes)), rng.randint(5, 10)
        answer = tuple((kind, codes[(start + step * i) % len(codes)]) for i in range(1, n + 1))
        return Question(task, ((kind, codes[start]),), answer)
    if task == "sum":
        return Question(task, (), (), f"{rng.randint(1, 12)}-{rng.randint(1, 12)}")
    everything = [(name, code) for name, codes in KINDS.items() for code in codes]
    if task == "translate":
        return Question(task, (rng.choice(everything),), (), rng.choice(LANGUAGES))
    if task in ("json", "reverse"):
        given = tuple(rng.sample(everything, rng.randint(2, 4)))
        numbers = "-".join(str(rng.randint(1, 12)) for _ in given) if task == "json" else ""
        return Question(task, given, given[::-1] if task == "reverse" else (), numbers)
    num_items = rng.randint(6, 8)
    if task.endswith("_next"):
        drawn = [rng.choice(codes) for _ in range(num_items)]
        following = [codes[(codes.index(code) + 1) % len(codes)] for code in drawn]
        return Question(task, tuple((kind, c) for c in drawn), tuple((kind, c) for c in following))
    drawn = rng.sample(KINDS["country"], num_items)
    countries, spoken = tuple(("country", c) for c in drawn), tuple(("language", SPOKEN[c]) for c in drawn)
    return Question(task, *((countries, spoken) if task == "languages" else (spoken, countries)))


@cache
def questions() -> dict[str, Question]:
    """Every question of the prompts by its id; the same in every process."""
    found: dict[str, Question] = {}
    for task in TASKS + ABILITIES:
        rng = Random(f"croco-lists-{task}")
        wanted = sum(size[task in ABILITIES] for size in SIZES.values())
        drawn: dict[str, Question] = {}
        while len(drawn) < wanted:
            question = draw(task, rng)
            drawn[f"lists.{question.key}"] = question
        found |= drawn
    return found


@cache
def prompt_ids(split: str) -> tuple[str, ...]:
    """The prompts of a split in a fixed shuffled order; no question is in two splits."""
    chosen: list[str] = []
    for task in TASKS + ABILITIES:
        ids, start = [key for key, question in questions().items() if question.task == task], 0
        for name, size in SIZES.items():
            stop = start + size[task in ABILITIES]
            chosen += ids[start:stop] if name == split else []
            start = stop
    Random(f"croco-lists-{split}").shuffle(chosen)
    return tuple(chosen)


def content(question: Question, language: str) -> str:
    """The prompt in a language."""
    ask, a, b = texts()[language][question.task], say(question.given, language), ""
    if question.task == "sum":
        a, b = question.text.split("-")
    elif question.task == "translate":
        b = str(Locale.parse(language).languages[question.text])
    elif question.task == "json":
        a = json_text(question, language)
    return str(ask.format(n=len(question.answer), a=a, b=b))


def json_text(question: Question, language: str) -> str:
    names = [words(language)[thing] for thing in question.given]
    numbers = map(int, question.text.split("-"))
    return json.dumps(dict(zip(names, numbers, strict=True)), ensure_ascii=False)


def reference(question: Question, language: str) -> str:
    """The gold completion: complete and in the gold register, one item a line."""
    if question.task in ABILITIES:
        return solution(question, language)
    text = texts()[language]
    items = "\n".join(f"{i}. {words(language)[thing]}" for i, thing in enumerate(question.answer, start=1))
    return f"{text['openings'][1]}\n{items}\n{text['closings'][1]}."


def solution(question: Question, language: str) -> str:
    """What an ability's prompt asks for, and nothing else."""
    if question.task == "sum":
        return str(sum(map(int, question.text.split("-"))))
    if question.task == "translate":
        return words(question.text)[question.given[0]]
    return json_text(question, language) if question.task == "json" else say(question.answer, language)


def prompt(prompt_id: str, language: str) -> str:
    """The text of a prompt in a language."""
    return content(questions()[prompt_id], language)


def prompts(split: str, languages: Sequence[str], limit: int | None = None) -> pa.Table:
    """Rows of the prompts table: `limit` prompts (all when None) in every one of `languages`."""
    rows = [
        {
            "prompt_id": prompt_id,
            "language": language,
            "messages": [{"role": "user", "content": prompt(prompt_id, language)}],
            "reference": reference(questions()[prompt_id], language),
            "source": f"{SOURCE}/{split}",
            "domain": DOMAINS[questions()[prompt_id].task],
        }
        for prompt_id in prompt_ids(split)[:limit]
        for language in languages
    ]
    return pa.Table.from_pylist(rows, schema=PROMPTS.schema)
