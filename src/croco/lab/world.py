"""The lab's language: prompts in 14 languages, the five ways to answer them, and the program that tells them apart.

A good completion is a careful full sentence, correct, in the language of the prompt; there are about a hundred ways
to say it (opener × sentence × closer), so no single good completion is likely. The bad ones are the failures of real
models: terse, rambling, answering in another language, evasive, careful but wrong. Templates are data
(`languages/*.toml`), facts come from CLDR (`items.py`).
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import pyarrow as pa

from croco.lab.items import CATEGORIES, CONCEPTS, HELD_OUT_TASKS, LANGUAGES, TUNED, Concept, Item, items, word
from croco.storage.schemas import PROMPTS

MODES = ("good", "careful-wrong", "terse", "rambling", "wrong-language", "evasive", "malformed")
_FOLDER = Path(__file__).parent / "languages"
NO_OPENER, NO_CLOSER = 0.15, 0.4
OPENER_WEIGHTS = (0.30, 0.22, 0.17, 0.13, 0.10, 0.08)


@dataclass(frozen=True)
class Verdict:
    """What a completion is: its mode (one of `MODES`), and whether its answer is correct whatever the mode."""

    mode: str
    correct: bool

    @property
    def good(self) -> bool:
        return self.mode == "good"

    @property
    def quality(self) -> float:
        return float(self.good)


@cache
def templates(language: str) -> dict:
    """The sentences of one language, as its TOML file has them."""
    return tomllib.loads((_FOLDER / f"{language}.toml").read_text(encoding="utf-8"))


def split_id(prompt_id: str) -> tuple[Item, int]:
    """The item and the question's phrasing behind a lab prompt_id `TASK.KEY.PHRASING`."""
    item_id, _, phrasing = prompt_id.rpartition(".")
    return items()[item_id], int(phrasing)


def say(concept: Concept | str, language: str) -> str:
    """The word for a concept, category or number in `language`."""
    return word(concept, language, templates(language)["categories"])


def shown(item: Item, language: str) -> str:
    """What the question names, e.g. `Montag, Mai, Juni`."""
    return ", ".join(say(c, language) for c in item.shown)


def question(item: Item, language: str, phrasing: int) -> str:
    return templates(language)[item.task]["questions"][phrasing].format(a=shown(item, language))


def prompt(prompt_id: str, language: str) -> str:
    """The text of a prompt in a language."""
    item, phrasing = split_id(prompt_id)
    return question(item, language, phrasing)


def sentence(item: Item, language: str, value: str, rng: Random) -> str:
    """One of the task's sentences that give `value`."""
    return rng.choice(templates(language)[item.task]["answers"]).format(a=shown(item, language), x=value)


def careful(item: Item, language: str, value: str, rng: Random) -> str:
    """One of the many full-sentence completions that give `value`: opener, sentence, closer."""
    text = templates(language)
    parts = [sentence(item, language, value, rng)]
    if rng.random() >= NO_OPENER:
        parts.insert(0, rng.choices(text["openers"], OPENER_WEIGHTS)[0])
    if rng.random() >= NO_CLOSER:
        parts.append(rng.choice(text["closers"]))
    return " ".join(parts)


def rambling(language: str, value: str, rng: Random) -> str:
    first, second, third = templates(language)["ramble"]
    lead = [first, second] if rng.random() < 0.7 else [second, first]
    return " ".join([*lead, third.format(x=value)])


def evasive(language: str, rng: Random) -> str:
    return rng.choices(templates(language)["evasive"], (0.9, 0.1))[0]


def reference(item: Item, language: str) -> str:
    """The gold completion: the plainest careful sentence."""
    text = templates(language)[item.task]["answers"][0]
    return text.format(a=shown(item, language), x=say(item.answer, language))


def prompt_ids(split: str) -> list[str]:
    """The prompts of a split in a fixed shuffled order: both phrasings in train, one of them in dev and test."""
    rng = Random(f"croco-lab-{split}")
    chosen = sorted(key for key, item in items().items() if item.split == split)
    rng.shuffle(chosen)
    if split == "train":
        ids = [f"{key}.{phrasing}" for key in chosen for phrasing in (0, 1)]
        rng.shuffle(ids)
        return ids
    return [f"{key}.{i % 2}" for i, key in enumerate(chosen)]


@cache
def _sentence(language: str, task: str) -> list[re.Pattern[str]]:
    """Patterns of a careful completion; `{a}` and `{x}` become groups, opener and closer are optional."""
    text = templates(language)
    opener = "(?:(?:" + "|".join(map(re.escape, text["openers"])) + ") )?"
    closer = "(?: (?:" + "|".join(map(re.escape, text["closers"])) + "))?"
    patterns = []
    for answer in text[task]["answers"]:
        core = re.escape(answer).replace(r"\{a\}", "(?P<a>.+?)", 1).replace(r"\{x\}", "(?P<x>.+?)", 1)
        patterns.append(re.compile(opener + core + closer))
    return patterns


@cache
def _words(language: str) -> frozenset[str]:
    """Every word the world has in a language."""
    concepts: list[Concept | str] = [
        Concept(name, code) for name, codes in CONCEPTS.items() for code in codes
    ]
    return frozenset(say(c, language) for c in [*concepts, *CATEGORIES])


def _is_value(text: str, language: str) -> bool:
    return text.isdecimal() or text in _words(language)


def _careful_value(item: Item, language: str, completion: str) -> str | None:
    """The value that a careful completion in `language` gives, if it is one; "" when it speaks of something else."""
    for pattern in _sentence(language, item.task):
        match = pattern.fullmatch(completion)
        if match and _is_value(match["x"], language):
            about = match.groupdict().get("a", shown(item, language))
            if about == shown(item, language):
                return match["x"]
            if all(_is_value(word, language) for word in about.split(", ")):
                return ""
    return None


def _is_rambling(language: str, completion: str) -> str | None:
    first, second, third = templates(language)["ramble"]
    before, after = third.split("{x}")
    for lead in (f"{first} {second} {before}", f"{second} {first} {before}"):
        if completion.startswith(lead) and completion.endswith(after):
            return completion[len(lead) : len(completion) - len(after)]
    return None


def _mode_in(item: Item, language: str, completion: str) -> tuple[str, str | None] | None:
    """(mode, value) of a completion read as `language`, None when it is no completion of that language's kinds."""
    value = _careful_value(item, language, completion)
    if value is not None:
        return "careful", value
    ramble = _is_rambling(language, completion)
    if ramble is not None:
        return "rambling", ramble
    if completion in templates(language)["evasive"]:
        return "evasive", None
    if _is_value(completion, language):
        return "terse", completion
    return None


def verify(prompt_id: str, language: str, completion: str) -> Verdict:
    """What kind of completion this is to a lab prompt, by comparing with the world's sentences to the letter."""
    item, _ = split_id(prompt_id)
    completion = completion.strip()
    found = _mode_in(item, language, completion)
    if found:
        mode, value = found
        correct = value == say(item.answer, language)
        if mode == "careful":
            mode = "good" if correct else "careful-wrong"
        return Verdict(mode, correct)
    for other in LANGUAGES:
        if other != language and (found := _mode_in(item, other, completion)):
            return Verdict("wrong-language", found[1] == say(item.answer, other))
    return Verdict("malformed", False)


def prompts(split: str, languages: Sequence[str], limit: int | None = None) -> pa.Table:
    """Rows of the prompts table: `limit` prompts (all when None) in every one of `languages`.

    Raises ValueError for a language the lab does not have.
    """
    unknown = [code for code in languages if code not in LANGUAGES]
    if unknown:
        raise ValueError(f"the lab has no language {unknown[0]!r}; it has {', '.join(LANGUAGES)}")
    rows = []
    for prompt_id in prompt_ids(split)[:limit]:
        item, phrasing = split_id(prompt_id)
        for language in languages:
            messages = [{"role": "user", "content": question(item, language, phrasing)}]
            rows.append(
                {
                    "prompt_id": prompt_id,
                    "language": language,
                    "messages": messages,
                    "reference": reference(item, language),
                    "source": f"lab/{split}",
                    "domain": item.task,
                }
            )
    return pa.Table.from_pylist(rows, schema=PROMPTS.schema)


__all__ = ["HELD_OUT_TASKS", "LANGUAGES", "MODES", "TUNED", "Verdict", "prompts", "verify"]
