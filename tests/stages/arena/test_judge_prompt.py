"""What a judge's words come to: nothing but a last line that says the verdict."""

import pytest

from croco.models.protocols import Judged
from croco.stages.arena.judge_prompt import CUT, REFUSED, UNPARSEABLE, question, read, value_of, verdict_of


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Verdict: 1", "1"),
        ("1 is wrong about the month.\n\nVerdict: 2\n", "2"),
        ("Both will do.\n**Verdict: tie**", "tie"),
        ("VERDICT:Tie.", "tie"),
        ("<think>Verdict: 1? No.\nVerdict: 1\n</think>\nVerdict: 2", "2"),
        ("Verdict: 2\nsaid again\nVerdict: 2", "2"),
        # markup
        ("**Verdict:** 1", "1"),
        ("**Verdict**: 1", "1"),
        ("Verdict: **2**", "2"),
        ("Verdict: *tie*.", "tie"),
        ("**Verdict: 2.**", "2"),
        ("### Verdict: tie", "tie"),
        ("## **Final verdict:** `1`", "1"),
        ("`Verdict: 1`", "1"),
        ("__Verdict: 2__", "2"),
        ("> Verdict: 1", "1"),
        ("- Verdict: 1", "1"),
        ("Verdict: [1]", "1"),
        ("Verdict: [tie]", "tie"),
        ('Verdict: "2"', "2"),
        ("Verdict\uff1a2", "2"),
        ("Verdict : 1", "1"),
        ("```\nVerdict: 1\n```", "1"),
        ("Verdict: 2\n\n---", "2"),
        ("The first is better: [[2]] would be wrong.\n[[1]]", "1"),
        ("[[2]]", "2"),
        ("**[[T]]**", "tie"),
        ("Verdict: 1\n**Verdict:** 1", "1"),
        ("**Verdict:** 1\n[[2]]", None),
        ("**Verdict:** 12", None),
        ("# 1", None),
        ("[1]", None),
        ("I say [[1]]", None),
        ("**Verdict:** not 1", None),
        ("**Verdict:** 1 (Completion 1)\nbut close", None),
        # prose, numbers and near misses
        ("Completion 1 is better.", None),
        ("1", None),
        ("Verdict: 3", None),
        ("Verdict: 1 or 2", None),
        ("My verdict: 1", None),
        ("Verdict: 1\nHowever, 2 is shorter.", None),
        ("Verdict: 1\nVerdict: 2", None),
        ("<think>hm\nVerdict: 1", None),
        ("", None),
    ],
)
def test_only_a_last_line_is_a_verdict(text, verdict):
    assert verdict_of(text) == verdict


def judged(text: str, finish_reason: str = "stop") -> Judged:
    return Judged(text, finish_reason, 100, 7)


def test_a_place_becomes_a_side():
    assert read(judged("Verdict: 1"), arm_first=True).verdict == "arm"
    assert read(judged("Verdict: 1"), arm_first=False).verdict == "base"
    assert read(judged("Verdict: 2"), arm_first=True).verdict == "base"
    assert read(judged("Verdict: 2"), arm_first=False).verdict == "arm"
    assert read(judged("Verdict: tie"), arm_first=False).verdict == "tie"


def test_no_verdict_has_a_reason():
    prose = read(judged("I like the first one, since it " + "is long " * 50 + "at last."), arm_first=True)
    assert prose.verdict is None
    assert prose.reason.startswith(f"{UNPARSEABLE}: arm first, it ends ")
    assert prose.reason.endswith("at last.'")
    assert len(prose.reason) < 200
    # a verdict that was said before the end came is none: more might have followed
    cut = read(judged("Verdict: 1", "length"), arm_first=False)
    assert (cut.verdict, cut.reason) == (None, f"{CUT}: base first, after 7 tokens")
    refused = read("the judge's prompt has 900 tokens, the context of x 512", arm_first=True)
    assert refused.reason.startswith(f"{REFUSED}: arm first, the judge's prompt has 900 tokens")


@pytest.mark.parametrize(
    ("arm_first", "base_first", "value"),
    [("arm", "arm", 1.0), ("base", "base", 0.0), ("tie", "tie", 0.5), ("arm", "base", 0.5), ("base", "arm", 0.5),
     ("arm", "tie", 0.5), ("tie", "base", 0.5)],
)  # fmt: skip
def test_what_two_orders_are_worth(arm_first, base_first, value):
    assert value_of([arm_first, base_first]) == value


def test_what_one_order_is_worth():
    assert [value_of([verdict]) for verdict in ("arm", "base", "tie")] == [1.0, 0.0, 0.5]


def test_either_way_of_asking_is_read():
    for labels, ends in {"words": ("Verdict: 1", "Verdict: tie"), "brackets": ("[[1]]", "[[T]]")}.items():
        text = question([{"role": "user", "content": "x"}], "da", "A", "B", labels)
        for end, verdict in zip(ends, ("1", "tie"), strict=True):
            assert f"\n{end}\n" in text
            assert verdict_of(f"It is shorter.\n{end}") == verdict


def test_the_question_holds_every_turn_and_both_completions_in_order():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hvad hedder hovedstaden?"},
    ]
    text = question(messages, "da", "FIRST {x}", "SECOND")
    places = [text.index(part) for part in ("Danish", "Be brief.", "Hvad hedder", "FIRST {x}", "SECOND")]
    assert places == sorted(places)
    turned = question(messages, "da", "SECOND", "FIRST {x}")
    assert turned.index("SECOND") < turned.index("FIRST {x}")
