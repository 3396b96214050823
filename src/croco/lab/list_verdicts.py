"""What a completion in the lists world is worth, measured by program in [0, 1].

It is read leniently, segment by segment, in any register: an opening, items, a closing. Its quality is 0.6 of the share
of items that are right and in the prompt's language, 0.2 of the share of gaps with a separator, 0.1 for an opening and
0.1 for a closing in the language; a completion that loops is a disaster and has 0."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from croco.lab.lists import ABILITIES, LANGUAGES, Question, questions, solution, texts, words

GOOD = 0.9  # quality from which on a completion is called good
LOOP = 2  # more segments than this many times the items wanted are a loop
SEPARATORS = re.compile(r"[,;/\n]|\d+\.")


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


@cache
def _segments() -> re.Pattern[str]:
    """Everything that can be a segment of a list, in every language, the longest first."""
    known = {word for language in LANGUAGES for word in words(language).values()}
    known |= {filler for language in LANGUAGES for filler in texts()[language]["fillers"]}
    return re.compile(
        r"(?<!\w)(?:" + "|".join(map(re.escape, sorted(known, key=len, reverse=True))) + r")(?!\w)", re.I
    )


@cache
def _languages_of() -> dict[str, set[str]]:
    """The languages that each word is of."""
    known: dict[str, set[str]] = {}
    for language in LANGUAGES:
        for word in words(language).values():
            known.setdefault(word.casefold(), set()).add(language)
    return known


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
    num_foreign = sum(language not in _languages_of().get(s, {language}) for s in found)
    num_fillers = num_unknown + sum(s not in _languages_of() for s in found)
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
            s.casefold() for s in _segments().findall(completion) if s.casefold() in _languages_of()
        ] == items
    return Verdict(float(right), "good" if right else "malformed")


def verify(prompt_id: str, language: str, completion: str) -> Verdict:
    """The verdict on a completion of one of the world's prompts."""
    return judge(questions()[prompt_id], language, completion)
