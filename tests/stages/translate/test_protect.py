"""What is cut out of a text before it is translated, and which items are counted in what is left."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from croco.stages.translate.protect import items, pieces, prose

MARKS = [
    "```",
    "~~~",
    "`",
    "$$",
    "\\[",
    "\\]",
    "\\begin{a}",
    "\\end{a}",
    "<tool_call>",
    "</tool_call>",
    "{",
    "}",
]
MARKS += [
    '{"a": 1}',
    '[{"b": [1, 2]}]',
    "[1]",
    "\n",
    " ",
    "Hvad er 1.234,5?",
    "https://x.dk/a",
    "{name}",
    "%s",
    "é",
]


@given(st.one_of(st.text(), st.lists(st.sampled_from(MARKS)).map("".join)))
def test_the_pieces_joined_are_the_text_and_only_words_are_sent(text: str) -> None:
    found = pieces(text)
    assert "".join(part for part, _ in found) == text
    for part, sent in found:
        assert part
        if sent:
            assert part == part.strip()
            assert any(character.isalpha() for character in part)


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("Que fait ce code ?\n```python\nprint('mars')\n```\nMerci.", ["Que fait ce code ?", "Merci."]),
        ("Fix it: ```x = 1``` now", ["Fix it:", "now"]),
        ("Warum?\n```js\nfetch()", ["Warum?"]),  # a fence that is not closed goes to the end
        ("~~~\nkode\n~~~\nHvorfor?", ["Hvorfor?"]),
        ("etwa ~~~ drei", ["etwa ~~~ drei"]),
        ("Solve $$x^2 = 1$$ for x.", ["Solve", "for x."]),
        ("\\begin{align}a &= b\\end{align} Prove it.", ["Prove it."]),
        ("It costs $$ to win.", ["It costs $$ to win."]),
        ('Tools: [{"name": "søg", "arguments": {}}] Brug dem.', ["Tools:", "Brug dem."]),
        ('{"city": "København"}', []),
        ("See [1] and {name}.", ["See [1] and {name}."]),
        ("<tool_call>{'name': 'f'}</tool_call> Fertig?", ["Fertig?"]),
        (" \n Ça va ?\n\n", ["Ça va ?"]),
        ("https://example.org/a 42 `x`", []),
        ("", []),
    ],
)
def test_what_is_sent(text: str, sent: list[str]) -> None:
    assert [part for part, is_sent in pieces(text) if is_sent] == sent


def test_items_are_found_and_none_twice() -> None:
    text = (
        "Run `pip install x==1.2` (see https://x.org/a?id=7.), mail a.b@c.dk, keep {name}, {{ user }}, ${HOME}, "
        "%s, %(count)d, $PATH, <b>bold</b> and \\frac{1}{2}; \\nThen 1,234.5 &#8220;euros&#8221;."
    )
    assert items(text) == {
        ("code", "`pip install x==1.2`"): 1,
        ("url", "https://x.org/a?id=7"): 1,
        ("email", "a.b@c.dk"): 1,
        ("placeholder", "{name}"): 1,
        ("placeholder", "{{ user }}"): 1,
        ("placeholder", "${HOME}"): 1,
        ("placeholder", "%s"): 1,
        ("placeholder", "%(count)d"): 1,
        ("placeholder", "$PATH"): 1,
        ("placeholder", "<b>"): 1,
        ("placeholder", "</b>"): 1,
        ("latex", "\\frac"): 1,
        ("number", "1"): 1,
        ("number", "2"): 1,
        ("number", "1234"): 1,
        ("number", "5"): 1,
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,234.5 tons", "1.234,5 Tonnen"),
        ("1,234,567 people", "1 234 567 personnes"),  # no-break spaces
        ("1,234,567 people", "1'234'567 Personen"),
        ("on 12/31/2024", "am 31.12.2024"),
        ("3.14159", "3,14159"),
        ("the 1920s", "die 1920er"),
        ("50%", "50 %"),
        ("٣ books", "3 bøger"),
    ],
)
def test_numbers_are_the_same_in_every_locale(one: str, other: str) -> None:
    assert items(one) == items(other)


def test_different_numbers_stay_different() -> None:
    assert items("1.5") != items("15")
    assert items("1,234") != items("1,2,34")
    assert items("1914") != items("1941")


def test_prose_is_what_has_a_language() -> None:
    assert prose("Hvad gør `list()`?\n```\nfor x in y\n```\nSe https://x.dk").split() == [
        "Hvad",
        "gør",
        "?",
        "Se",
    ]


@pytest.mark.parametrize("part", [*MARKS, "a", "a.", "<a b='", '{"a":', "1", "1.234 "])
def test_no_text_takes_long(part: str) -> None:
    start = time.process_time()
    text = part * (40_000 // len(part))
    pieces(text), items(text)
    assert time.process_time() - start < 2
