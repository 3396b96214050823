"""Values that nobody means, for tests that throw them at readers, and the seed that such a test prints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st

SEED = int(os.environ.get("CROCO_FUZZ_SEED") or 2605)
TIMES = int(os.environ.get("CROCO_FUZZ_TIMES") or 1)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["\ud800", 10**12, 10**40, -1, "running", "complete", "removed"]),
    lambda below: st.lists(below, max_size=2) | st.dictionaries(st.text(max_size=3), below, max_size=2),
    max_leaves=4,
)
ODD = (
    None, True, False, 0, -1, 1, 2, 3.5, 10**6, 10**9, 10**12, 2**63, -(2**63), 10**40, 1e308, -0.0, float("nan"),
    float("inf"), "", " ", "0", "x", "auto", "none", "lab", "lab:policy", "lab:nothing", "all", "base", "en", "da",
    "no", "en-GB", "zz-ZZ", "../x", "/", "~", "~nobody/x", "\0", "a\nb", "\x1b[2J", "\u202e", "\u0301", "\u200b", "😀",
    "a" * 5000, "hf:x/y", "{language}", "mean-2std", "mean+K*std", "mean-1e9std", "quantile:1.0000", "gap:0",
    "file.py:f", [], {}, [[]], [None], ["en"], ["en", "en"], [0, 1], [1, 0], {"": ""}, {"a": {"b": {"c": []}}}, [{}],
    {"en": "x"},
)  # fmt: skip


def fuzzed(cases: int) -> Callable[[Any], Any]:
    """Runs a test on so many cases, from the seed that it prints; CROCO_FUZZ_SEED is another, CROCO_FUZZ_TIMES
    multiplies them."""
    print(f"CROCO_FUZZ_SEED={SEED}")
    chosen = settings(
        max_examples=cases * TIMES,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: chosen(seed(SEED)(test))


def mutate(data: st.DataObject, value: Any, values: st.SearchStrategy[Any] = JSON) -> Any:
    """A JSON value with another one, or nothing, in some place of it."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 3)):
        key = data.draw(st.sampled_from(sorted(value)))
        kind = data.draw(st.integers(0, 9))
        if kind == 0:
            return {name: below for name, below in value.items() if name != key}
        if kind == 1:
            other = data.draw(st.sampled_from(sorted(value)) | st.text(max_size=3))
            return {**value, other: value[key]}
        return {**value, key: mutate(data, value[key], values)}
    if isinstance(value, list) and value and data.draw(st.integers(0, 3)):
        place = data.draw(st.integers(0, len(value) - 1))
        kind = data.draw(st.integers(0, 9))
        if kind < 2:
            return [*value[:place], *value[place + 1 :]] if kind else [*value, value[place]]
        return [*value[:place], mutate(data, value[place], values), *value[place + 1 :]]
    return data.draw(values)


def spoilt(data: st.DataObject, content: bytes) -> bytes:
    """Bytes with one bit turned, some cut, put in or exchanged."""
    place = data.draw(st.integers(0, max(0, len(content) - 1)))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "swap", "twice"]))
    if kind == "flip" and content:
        turned = content[place] ^ 1 << data.draw(st.integers(0, 7))
        return content[:place] + bytes([turned]) + content[place + 1 :]
    if kind == "insert":
        return content[:place] + data.draw(st.binary(max_size=9)) + content[place:]
    other = data.draw(st.integers(0, max(0, len(content) - 1)))
    if kind == "swap":
        return content[:other] + content[place : place + 9] + content[other + 9 :]
    return content[:place] + content if kind == "twice" else content[:place]


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
