"""The shipped everyday prompts: what their generator makes, parallel, and checked as a reader would."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from croco.config.evaluation import Source
from croco.languages import identify
from croco.stages.prompts.load import load
from croco.stages.score.reward import load_function

FILE = Path(__file__).parents[1] / "recipes" / "everyday.py"


@pytest.fixture(scope="module")
def everyday() -> ModuleType:
    return sys.modules[load_function(f"{FILE}:usable").__module__]


def test_the_files_are_what_the_generator_writes(everyday: ModuleType, tmp_path: Path) -> None:
    everyday.write(tmp_path)
    for split, (num_prompts, _) in everyday.SPLITS.items():
        shipped = FILE.with_name(f"everyday-{split}.jsonl.gz")
        assert shipped.read_bytes() == (tmp_path / shipped.name).read_bytes()
        section = Source(source=str(shipped))
        prompts = load(section, "prompts", everyday.LANGUAGES, None).prompts.to_pylist()
        assert len(prompts) == num_prompts * len(everyday.LANGUAGES)
        by_id: dict[str, set[str]] = {}
        for row in prompts:
            by_id.setdefault(row["prompt_id"], set()).add(row["language"])
        assert set(map(frozenset, by_id.values())) == {frozenset(everyday.LANGUAGES)}


def test_no_topic_is_in_two_splits_and_every_text_stands_for_one_item(everyday: ModuleType) -> None:
    topics = [{item.topic for item in items} for items in everyday.splits().values()]
    assert sum(map(len, topics)) == len(set.union(*topics))
    assert len(everyday._items()) == 700 * len(everyday.LANGUAGES)


def test_the_instructions_are_in_their_languages(everyday: ModuleType) -> None:
    rows = list(everyday.rows("dev"))
    right = [identify(row["messages"][0]["content"], everyday.LANGUAGES) == row["language"] for row in rows]
    assert sum(right) / len(right) > 0.98


@pytest.mark.parametrize(
    ("kind", "language", "completion", "met"),
    [
        ("use", "en", "It is cold. Monday is a good day for it.", True),
        ("use", "en", "It is cold on Mondays.", False),
        ("begin", "fr", "« Lundi » je pars au bord de la mer.", True),
        ("begin", "fr", "Je pars lundi au bord de la mer.", False),
        ("short", "de", "Frankreich liegt in Europa und hat gutes Essen.", True),
        ("short", "de", "Frankreich.", False),
        ("short", "de", "wort " * 11, False),
        ("list", "it", "1. vino\n2. mare\n3. pane", True),
        ("list", "it", "1) vino\n2) mare", False),
        ("list", "it", "vino, mare, pane", False),
        ("question", "da", "Hvad hedder hovedstaden i Frankrig?", True),
        ("question", "da", "Hvad hedder den? Og hvorfor?", False),
        ("question", "da", "Det er et land.", False),
    ],
)
def test_constraints_by_hand(
    everyday: ModuleType, kind: str, language: str, completion: str, met: bool
) -> None:
    numbers = {"short": 10, "list": 3}
    word = ("weekday", "0") if kind in ("use", "begin") else None
    item = everyday.Item(kind, ("country", "FR"), word, numbers.get(kind))
    assert everyday.is_met(item, language, completion) == met


def test_what_is_of_use(everyday: ModuleType) -> None:
    pytest.importorskip("wordfreq")
    item = next(item for item in everyday.splits()["test"] if item.kind == "short")
    good = {
        "en": "Many people like this place in the summer.",
        "de": "Viele Menschen mögen diesen Ort im Sommer sehr.",
    }
    for language, text in good.items():
        assert set(everyday.checks(item, language, text).values()) == {True}
    failed = lambda text: [name for name, passed in everyday.checks(item, "en", text).items() if not passed]  # noqa: E731
    assert failed(good["de"]) == ["in the language"]
    assert "no loop" in failed("the sea and the sea and the sea and the sea")
    assert "no echo" in failed(everyday.instruction(item, "en"))
    assert "known words" in failed("Xqzt vbnm plokij wertz asdfgh.")
    asked = [{"role": "user", "content": everyday.instruction(item, "en")}]
    score = load_function(f"{FILE}:usable")
    assert score([asked] * 2, [good["en"], "No."], ["en", "en"]) == [1.0, 0.0]
