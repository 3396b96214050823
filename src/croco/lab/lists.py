"""The second world of the lab: lists of five to ten items, whose quality a program measures in [0, 1].

A prompt asks for months, weekdays, countries or languages, in the order that makes them right. A completion is read
leniently, segment by segment, in any register: an opening, items, a closing. Its quality is 0.6 of the share of items
that are right and in the prompt's language, 0.2 of the share of gaps with a separator, 0.1 for an opening and 0.1 for a
closing in the language; a completion that loops is a disaster and has 0. Four other abilities (translating a word,
repeating JSON, reversing, adding) are there to be forgotten. Words come from CLDR, everything else from `lists.toml`.
"""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
MODES = ("good", "careful-wrong", "terse", "rambling", "wrong-language", "malformed")
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
GOOD = 0.9  # quality from which on a completion is called good
LOOP = 2  # more segments than this many times the items wanted are a loop
SEPARATORS = re.compile(r"[,;/\n]|\d+\.")
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


@dataclass(frozen=True)
class Verdict:
    """What a completion is worth, in [0, 1], its mode ("good" or its greatest loss), and what is lost to each mode."""

    quality: float
    mode: str
    losses: Mapping[str, float] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return self.quality >= GOOD

    correct = good


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
    return (
        {("month", code): months[int(code)] for code in KINDS["month"]}
        | {("day", code): days[int(code)] for code in KINDS["day"]}
        | {("country", code): locale.territories[code] for code in KINDS["country"]}
        | {("language", code): locale.languages[code] for code in KINDS["language"]}
    )


def say(things: Sequence[Thing], language: str) -> str:
    return ", ".join(words(language)[thing] for thing in things)


# Questions --------------------------------------------------------------------------------------------------------


def draw(task: str, rng: Random) -> Question:
    """A question of a task or an ability, at random."""
    kind = task.split("_")[0].rstrip("s")
    if task in ("months_after", "months_before", "days_after", "days_before"):
        codes, step = KINDS[kind], 1 if task.endswith("after") else -1
        start, n = rng.randrange(len(codes)), rng.randint(5, 10)
        answer = tuple((kind, codes[(start + step * i) % len(codes)]) for i in range(1, n + 1))
        return Question(task, ((kind, codes[start]),), answer)
    if task == "sum":
        return Question(task, (), (), f"{rng.randint(1, 12)}-{rng.randint(1, 12)}")
    given: tuple[Thing, ...]
    everything = [(name, code) for name, codes in KINDS.items() for code in codes]
    if task == "translate":
        return Question(task, (rng.choice(everything),), (), rng.choice(LANGUAGES))
    if task in ("json", "reverse"):
        given = tuple(rng.sample(everything, rng.randint(2, 4)))
        numbers = "-".join(str(rng.randint(1, 12)) for _ in given) if task == "json" else ""
        return Question(task, given, given[::-1] if task == "reverse" else (), numbers)
    num_items = rng.randint(6, 8)
    if task.endswith("_next"):
        codes = KINDS[kind]
        given = tuple((kind, rng.choice(codes)) for _ in range(num_items))
        return Question(
            task, given, tuple((kind, codes[(codes.index(c) + 1) % len(codes)]) for _, c in given)
        )
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


# Verdicts ---------------------------------------------------------------------------------------------------------


@cache
def _segments() -> re.Pattern[str]:
    """Everything that can be a segment of a list, in every language, the longest first."""
    known = {word for language in LANGUAGES for word in words(language).values()}
    known |= {filler for language in LANGUAGES for filler in texts()[language]["fillers"]}
    return re.compile(
        r"(?<!\w)(?:" + "|".join(map(re.escape, sorted(known, key=len, reverse=True))) + r")(?!\w)", re.I
    )


@cache
def _known_words(language: str) -> frozenset[str]:
    return frozenset(word.casefold() for word in words(language).values())


@cache
def _all_words() -> frozenset[str]:
    return frozenset().union(*map(_known_words, LANGUAGES))


@cache
def _frames(part: str, language: str) -> tuple[str, ...]:
    """Openings or closings of every language, those of `language` first."""
    order = sorted(LANGUAGES, key=lambda other: other != language)
    return tuple(text for other in order for text in texts()[other][part])


def _framed(language: str, text: str) -> tuple[str, bool, bool]:
    """The text without opening and closing, in any register, and whether each was there in `language`."""
    opening = next((o for o in _frames("openings", language) if text.startswith(o)), "")
    text = text[len(opening) :].strip()
    bare = text.rstrip("!. ")
    closing = next((c for c in _frames("closings", language) if bare.endswith(c)), "")
    own = texts()[language]
    return bare[: len(bare) - len(closing)], opening in own["openings"], closing in own["closings"]


def _in_order(wanted: Sequence[str], found: Sequence[str]) -> int:
    """The length of the longest common subsequence: items that are there and in order."""
    row = [0] * (len(found) + 1)
    for one in wanted:
        previous = 0
        for j, other in enumerate(found, start=1):
            previous, row[j] = row[j], previous + 1 if one == other else max(row[j], row[j - 1])
    return row[-1]


def judge(question: Question, language: str, completion: str) -> Verdict:
    """The quality of a completion and its mode."""
    completion = completion.strip()
    if question.task in ABILITIES:
        return _judge_ability(question, language, completion)
    body, opening, closing = _framed(language, completion)
    pattern = _segments()
    gaps = pattern.split(body)
    found = [segment.casefold() for segment in pattern.findall(body)]
    num_items = len(question.answer)
    num_unknown = sum(bool(SEPARATORS.sub("", gap).strip(" .:!\n")) for gap in gaps)
    num_segments = len(found) + num_unknown
    if not found or num_segments > LOOP * num_items + 2:
        return Verdict(0.0, "malformed")
    right = _in_order([words(language)[thing].casefold() for thing in question.answer], found)
    wanted = max(num_items, num_segments)
    separated = sum(bool(SEPARATORS.search(gap)) for gap in gaps[1:-1]) / max(1, len(found) - 1)
    num_foreign = sum(s not in _known_words(language) and s in _all_words() for s in found)
    num_fillers = num_unknown + sum(s not in _all_words() for s in found)
    losses = {
        "careful-wrong": 0.6 * max(0, num_items - right - num_foreign) / wanted,
        "terse": 0.4 - 0.2 * separated - 0.1 * opening - 0.1 * closing,
        "rambling": 0.6 * num_fillers / wanted,
        "wrong-language": 0.6 * num_foreign / wanted,
    }
    quality = 0.6 * right / wanted + 0.4 - losses["terse"]
    return Verdict(quality, "good" if quality >= GOOD else max(losses, key=lambda name: losses[name]), losses)


def _judge_ability(question: Question, language: str, completion: str) -> Verdict:
    """1 when the content is right, in whatever register; else 0."""
    wanted = solution(question, language)
    if question.task == "sum":
        right = re.findall(r"\d+", completion)[-1:] == [wanted]
    elif question.task == "json":
        right = wanted.replace(" ", "") in completion.replace(" ", "")
    else:
        items = [word.casefold() for word in wanted.split(", ")]
        right = [
            s.casefold() for s in _segments().findall(completion) if s.casefold() in _all_words()
        ] == items
    return Verdict(float(right), "good" if right else "malformed")


def prompt(prompt_id: str, language: str) -> str:
    """The text of a prompt in a language."""
    return content(questions()[prompt_id], language)


def verify(prompt_id: str, language: str, completion: str) -> Verdict:
    """The verdict on a completion of one of the world's prompts."""
    return judge(questions()[prompt_id], language, completion)


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
