"""What the columns of a row mean in the forms of other tools, and what is refused or left out."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from croco.errors import UserError
from croco.stages.prompts.columns import NAMES, FileRow
from croco.stages.prompts.values import (
    Unusable,
    read_finish_reason,
    read_ids,
    read_sample_id,
    read_score,
)


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


Q, YES, NO, SYSTEM = turn("user", "Q"), turn("assistant", "yes"), turn("assistant", "no"), turn("system", "S")
SIDES = {"chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        ({"prompt": "Q", **SIDES}, [Q]),
        ({"prompt": [SYSTEM, Q], "chosen": [YES], "rejected": [NO]}, [SYSTEM, Q]),
        ({"prompt": [SYSTEM, Q], "chosen": [Q, YES], "rejected": [Q, NO]}, [SYSTEM, Q]),  # the system turn stays
        ({"prompt": [Q], "chosen": [SYSTEM, Q, YES], "rejected": [SYSTEM, Q, NO]}, [SYSTEM, Q]),
        ({"prompt": "Q", "chosen": [Q, YES], "rejected": [Q, NO], "messages": [Q, YES]}, [Q]),  # UltraFeedback
        ({"system": "S", "question": "Q", **SIDES}, [SYSTEM, Q]),  # Orca
        ({"system": "S", "chosen": [Q, YES], "rejected": [Q, NO]}, [SYSTEM, Q]),
        ({"system": "", "input": "Q", **SIDES}, [Q]),
        ({"instruction": "Q", "input": "x", **SIDES}, [turn("user", "Q\nx")]),  # Alpaca, LLaMA-Factory
        ({"instruction": "Q", "input": "", "history": [["a", "b"]], **SIDES},
         [turn("user", "a"), turn("assistant", "b"), Q]),
        ({"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "yes"},
          "rejected": {"from": "gpt", "value": "no"}}, [Q]),  # ShareGPT, LLaMA-Factory
        ({"messages": [SYSTEM, Q, YES], "rejected_response": "no"}, [SYSTEM, Q]),  # ms-swift
        ({"messages": [Q], "chosen": YES, "rejected": NO}, [Q]),  # axolotl
        ({"query": "Q", "response": "yes", "rejected_response": "no"}, [Q]),
        ({"prompt": [turn("developer", "S"), {"role": "user", "content": [{"type": "text", "text": "Q"}]}], **SIDES},
         [SYSTEM, Q]),
        ({"prompt": [Q], "chosen": [NO, Q, YES], "rejected": [NO, Q, NO]}, [Q, NO, Q]),  # a completion of turns
    ],
)  # fmt: skip
def test_a_pair_in_every_form(values: dict[str, Any], prompt: list[dict[str, str]]) -> None:
    row = FileRow("f, line 1", values)
    assert row.is_pair()
    assert row.sides() == (prompt, {"chosen": "yes", "rejected": "no"})


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        ({"messages": [SYSTEM, Q, YES]}, [SYSTEM, Q]),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "yes"}], "system": "S"},
         [SYSTEM, Q]),
        ({"instruction": "Q", "input": "x", "output": "yes", "text": "Below: Q\nx ... yes"}, [turn("user", "Q\nx")]),
        ({"prompt": [Q], "completion": [YES]}, [Q]),
        ({"question": "Q", "response": "yes"}, [Q]),
    ],
)  # fmt: skip
def test_a_completion_in_every_form(values: dict[str, Any], prompt: list[dict[str, str]]) -> None:
    assert FileRow("f, line 1", values).answered() == (prompt, "yes")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"prompt": "Q", "input": "more", **SIDES}, "column input holds something else than the prompt"),
        ({"prompt": "P", "question": "Q", **SIDES}, "column question holds something else"),
        ({"prompt": [turn("user", "P")], "chosen": [Q, YES], "rejected": [Q, NO]}, "are two prompts"),
        ({"system": "T", "prompt": [SYSTEM, Q], **SIDES}, "two system prompts"),
        ({"instruction": "Q", "input": ["x"], **SIDES}, "input is a list"),
        ({"instruction": "Q", "history": ["a"], **SIDES}, "history is not a list of"),
        ({"prompt": [{"role": ["user"], "content": "Q"}], **SIDES}, "role is"),
    ],
)
def test_what_says_something_else_is_refused_by_name(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=rf"^f, line 1.*{sentence}"):
        FileRow("f, line 1", values).sides()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"tools": [{"name": "f"}]}, "the row has tools"),
        ({"images": ["x"]}, "the row has images"),
        ({"prompt": [{**Q, "tool_calls": [1]}]}, "a message has tool_calls"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of type 'image'"),
        ({"chosen": [Q, {**YES, "weight": 0}], "rejected": [Q, NO]}, "weight 0, so it is not to be learnt"),
        ({"prompt": [{"from": "function_call", "value": "f()"}]}, "a message is a function_call"),
    ],
)
def test_what_cannot_be_carried_is_a_reason(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        FileRow("f, line 1", {"prompt": "Q", **SIDES, **values}).sides()


def test_a_mapped_column_is_the_one_that_is_read() -> None:
    values = {"prompt": "the formatted one", "question": "Q", **SIDES}
    assert FileRow("f", values, {"prompt": "question"}).sides()[0] == [Q]


def test_what_has_no_use_is_counted() -> None:
    unread = Counter[str]()
    FileRow(
        "f", {"prompt": [{**Q, "toxic": True}], **SIDES, "topic": "x", "tools": "[]"}, None, unread
    ).sides()
    assert unread == {"message key toxic": 1, "topic": 1, "tools": 1}
    unread.clear()
    beside = {"messages": [Q, YES], "response": "another", "question": None}
    FileRow("f", {"prompt": "Q", **SIDES, **beside}, None, unread).sides()
    assert unread == {"response": 1}  # the others say what was read


@pytest.mark.parametrize(
    ("value", "reason"),
    [("stop", "stop"), ("eos_token", "stop"), ("end_turn", "stop"), ("STOP", "stop"), (None, "stop"),
     ("length", "length"), ("MAX_TOKENS", "length"), ("max-tokens", "length")],
)  # fmt: skip
def test_finish_reasons_of_other_tools(value: str | None, reason: str) -> None:
    assert read_finish_reason("f, line 1", value) == reason


def test_finish_reasons_that_are_no_end() -> None:
    with pytest.raises(Unusable, match="the completion ended with 'content_filter'"):
        read_finish_reason("f, line 1", "content_filter")
    with pytest.raises(
        UserError, match="f, line 1: the finish reason 'zonk' is unknown, expected one of stop,"
    ):
        read_finish_reason("f, line 1", "zonk")
    with pytest.raises(UserError, match="f, line 1: finish_reason is a number"):
        read_finish_reason("f, line 1", 3)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 10**400)
    | st.floats()
    | st.sampled_from(["", "Q", "yes", "[]", "stop"])
)
TURNS = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "weight", "name", "tool_calls", "toxic"]),
    SCALARS
    | st.sampled_from(["user", "assistant", "system", "human", "gpt"])
    | st.lists(
        st.dictionaries(st.sampled_from(["type", "text"]), SCALARS | st.just("text"), max_size=2), max_size=2
    ),
    max_size=4,
)
VALUES = SCALARS | TURNS | st.lists(SCALARS | TURNS | st.lists(SCALARS, max_size=2), max_size=3)
COLUMNS = sorted({"history", "tools", "label", "images", "chosen_ids", "topic", *sum(NAMES.values(), ())})


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=7),
    st.dictionaries(st.sampled_from(sorted(NAMES)), st.sampled_from(COLUMNS), max_size=2),
)
def test_no_row_ends_in_anything_but_a_sentence(values: dict[str, Any], columns: dict[str, str]) -> None:
    for read in (FileRow.sides, FileRow.answered, FileRow.prompt, FileRow.completion):
        row = FileRow("f, line 1", values, columns)
        with contextlib.suppress(UserError, Unusable):
            read(row)
    readers = (read_score, read_sample_id, read_finish_reason)
    for value in values.values():
        for reader in readers:
            with contextlib.suppress(UserError, Unusable):
                reader("f, line 1", value)
        with contextlib.suppress(UserError):
            read_ids("f, line 1", value, "chosen_ids")
