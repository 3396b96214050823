"""Guards: each drops, flags or is off, and near duplicates are found without normalising everything."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import croco
from croco.stages.pair.guards import REASONS, outlines
from stages.pair.twin import normal

DANISH = "Det er en kold dag i dag, og vi bliver inde hele dagen."
ENGLISH = "It is a cold day today, and we are staying in all day long."


def scored(*texts: str, language: str = "da", **columns) -> pl.DataFrame:
    """One pool whose scores rise."""
    num = len(texts)
    table = pl.DataFrame({"sample_id": range(num), "score": map(float, range(num)), "completion": texts})
    table = table.with_columns(prompt_id=pl.lit("p"), language=pl.lit(language))
    return table.with_columns(**{name: pl.Series(values) for name, values in columns.items()})


def left_out(table: pl.DataFrame, **guards) -> dict[int, str]:
    dropped = croco.pairs(table, rejected="min", guards=guards)[1]
    return dict(dropped.filter(pl.col("unit") == "completion").select("sample_id", "reason").rows())


def test_every_guard_has_its_reason():
    table = scored("fine", " \n", "cut of", "fine", "Fine ", "infinite", "long", "last",
                   finish_reason=["stop", "stop", "length"] + ["stop"] * 5,
                   prompt_tokens=pl.Series([4] * 8, dtype=pl.Int32), completion_tokens=[3] * 6 + [30, 3])  # fmt: skip
    table = table.with_columns(score=pl.when(pl.col("sample_id") == 5).then(float("inf")).otherwise("score"))
    found = left_out(table, max_tokens=33)
    assert found == {1: REASONS["empty"], 2: REASONS["cut"], 3: REASONS["duplicate"], 4: REASONS["near_duplicate"],
                     5: REASONS["not_finite"], 6: REASONS["too_long"]}  # fmt: skip
    off = dict.fromkeys(("empty", "cut", "duplicate", "near_duplicate", "too_long"), "off")
    assert left_out(table, **off, max_tokens=33) == {5: REASONS["not_finite"]}


def test_what_shows_nothing_is_empty_and_what_differs_in_nothing_seen_is_a_duplicate():
    table = scored(
        "one", "\u200b", " \u200e\u200d\n", "\ufeff\u3164", "\u2800", "on\u200be", "\u202bOne\u202c", "two"
    )
    near = REASONS["near_duplicate"]
    assert left_out(table) == dict.fromkeys((1, 2, 3, 4), REASONS["empty"]) | {5: near, 6: near}


def test_the_same_text_in_another_language_or_prompt_is_no_duplicate():
    table = scored("42", "43")
    others = [table, table.with_columns(language=pl.lit("nl")), table.with_columns(prompt_id=pl.lit("q"))]
    assert left_out(pl.concat(others)) == {}


def test_only_a_sound_completion_makes_a_later_one_a_duplicate():
    table = scored("same", "same", "same", "other", finish_reason=["length", "stop", "stop", "stop"])
    assert left_out(table) == {0: REASONS["cut"], 2: REASONS["duplicate"]}


def test_what_nobody_sees_is_no_text():
    """Zero-width characters, direction marks and soft hyphens: alone they are empty, between letters no difference."""
    fox = "The quick brown fox jumps over the lazy dog."
    table = scored(
        "\u200b\u2060",
        fox,
        "\u200f" + fox.replace("quick", "qu\u00adick"),
        "\ufeff \u00a0",
        fox[:-1],
        language="en",
    )
    assert left_out(table) == {0: REASONS["empty"], 2: REASONS["near_duplicate"], 3: REASONS["empty"]}


def test_flagged_completions_stay_and_say_so_in_their_pair():
    table = scored("first one", "second one", "SECOND one", finish_reason=["stop", "stop", "length"])
    pairs, dropped = croco.pairs(table, rejected="min", guards={"cut": "flag", "near_duplicate": "flag"})
    assert pairs["chosen"].to_list() == ["SECOND one"]
    assert pairs["pool_size"].to_list() == [3]
    flags = ["chosen: cut at the token limit", "chosen: near duplicate of an earlier completion"]
    assert pairs["flags"].to_list() == [flags]
    assert dropped.filter(pl.col("unit") == "flag")["reason"].to_list() == flags


def test_the_wrong_language_is_dropped_or_flagged_and_short_texts_are_not_judged():
    table = scored(DANISH, DANISH[:20] + " igen", ENGLISH, "Amsterdam 42")
    assert left_out(table, wrong_language="drop") == {2: REASONS["wrong_language"]}
    pairs, _ = croco.pairs(table[:3], rejected="min")
    assert pairs["chosen"].to_list() == [
        DANISH[:20] + " igen"
    ]  # by default no text in the wrong language is learnt
    pairs, _ = croco.pairs(table[:3], rejected="min", guards={"wrong_language": "flag"})
    assert pairs["flags"].to_list() == [["chosen: wrong language"]]
    assert croco.pairs(table[:3], rejected="min", guards={"wrong_language": "off"})[0]["flags"].to_list() == [
        []
    ]
    # a language that the identifier does not know is not judged by it
    assert left_out(table.with_columns(language=pl.lit("kl")), wrong_language="drop") == {}


@pytest.mark.parametrize(("guard", "reason"), [
    ({"score_gap": "drop", "min_score_gap": 2.5}, "score gap is too small"),
    ({"length_ratio": "drop", "max_length_ratio": 2.0}, "chosen and rejected differ too much in length"),
])  # fmt: skip
def test_guards_of_the_pair(guard, reason):
    table = scored("short", "a longer one", "the longest of them all")
    pairs, dropped = croco.pairs(table, rejected="min", guards=guard)
    assert pairs.height == 0
    assert dropped.select("unit", "sample_id", "reason").rows() == [
        ("pair", 2, reason),
        ("pool", None, reason),
    ]
    flagged, _ = croco.pairs(table, rejected="min", guards=guard | {next(iter(guard)): "flag"})
    assert flagged["flags"].to_list() == [[reason]]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.text(st.sampled_from(" \t\nKkİiÅåÉé.aB"), max_size=60), st.data())
def test_near_duplicates_share_their_outline_or_have_none(text, pattern, data):
    base = text + pattern + "twelve letters at the end"
    other = "".join(
        data.draw(st.sampled_from([" ", "  ", "\n", "\t "])) if character == " " else
        data.draw(st.sampled_from([character.upper(), character])) for character in base
    )  # fmt: skip
    if normal(base) != normal(other):
        return  # upper and lower case are not always each other's
    one, two = outlines(pl.Series([base, f"  {other}\n"]))
    assert one == two or 0 in (one, two)


def test_an_outline_tells_texts_apart():
    texts = [f"The capital of country {number} is called town {number}." for number in range(500)]
    assert len(np.unique(outlines(pl.Series(texts)))) > 450
