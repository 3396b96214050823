"""Values of rows that other tools wrote: messages as {role, content}, scores, finish reasons, token ids.

What a prompt cannot carry (a tool call, a picture) raises `Unusable`, a value of a wrong type UserError. Unknown keys
of messages are counted."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from croco.errors import UserError
from croco.storage.rows import kind
from croco.storage.schemas import ROLES, UnknownFinishReason, finish_reason

Turn = dict[str, str]
LARGEST_INT = 2**31 - 1
# what a template or a trainer would do something with
CANNOT_CARRY = ("tool_calls", "function_call", "tool_call_id", "name", "images", "audio", "reasoning_content",
                "reasoning", "thinking", "refusal", "prefix")  # fmt: skip
ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system",
              "observation": "tool", "ipython": "tool"}  # fmt: skip


class Unusable(Exception):
    """A row that is right but cannot be used; the text is the reason for the ledger."""


def read_turns(
    where: str, value: Any, unread: Counter[str], what: str = "the prompt", role: str = "user"
) -> list[Turn]:
    """Messages in any form; a text is one turn of `role`. Keys that are not read are counted in `unread`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {what} is {kind(value)}, expected text or messages")
    return [_turn(f"{where}, message {number}", turn, unread) for number, turn in enumerate(value, start=1)]


def _turn(here: str, turn: Any, unread: Counter[str]) -> Turn:
    if not isinstance(turn, Mapping):
        raise UserError(f"{here}: expected {{role, content}}, found {kind(turn)}")
    names = ("from", "value") if "role" not in turn and "from" in turn else ("role", "content")
    role, content = (turn.get(name) for name in names)
    if role in ("function_call", "tool_call"):
        raise Unusable(f"a message is a {role}, which a prompt cannot carry")
    if isinstance(role, str) and (names[0] == "from" or role == "developer"):
        role = ROLE_NAMES.get(role, role)
    if role not in ROLES:
        raise UserError(f"{here}: role is {role!r}, expected one of {', '.join(ROLES)}")
    others = {name for name in turn if name not in names and turn[name] not in (None, "", [], {})}
    if extra := sorted(name for name in others & set(CANNOT_CARRY) if says_something(turn[name])):
        raise Unusable(f"a message has {', '.join(extra)}, which a prompt cannot carry")
    unread.update(f"message key {name}" for name in others)
    if isinstance(content, list) and content:
        content = _joined(here, content)
    if not isinstance(content, str):
        raise UserError(f"{here}: content is {kind(content)}, expected text")
    return {"role": role, "content": content}


def _joined(here: str, parts: Sequence[Any]) -> str:
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise UserError(f"{here}: found the part {json.dumps(part, default=str)[:80]}, expected text")
        if part["type"] != "text":
            raise Unusable(f"a message has a part of type {part['type']!r}, which a prompt cannot carry")
        if not isinstance(part.get("text"), str):
            raise UserError(f"{here}: the text of a part is {kind(part.get('text'))}, expected text")
    return "".join(part["text"] for part in parts)


def says_something(value: Any) -> bool:
    """Whether a value is more than nothing: "", [], {}, "[]", 0, false and null say nothing."""
    return bool(value) and value not in ("[]", "{}")


def read_score(where: str, value: Any) -> float:
    """A score as a number; nan where it is not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{where}: score is {kind(value)}, expected a number")
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        raise UserError(f"{where}: score has more digits than a number can have here") from None


def read_sample_id(where: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST_INT:
        shown = f"{value}" if type(value) is int and value > 0 else kind(value)
        raise UserError(f"{where}: sample_id is {shown}, expected a whole number from 0 on (to 2^31 - 1)")
    return value


def read_finish_reason(where: str, value: Any, name: str = "finish_reason") -> str:
    """ "stop" or "length" for what another tool calls it; "stop" where there is none."""
    if value is None or value == "":
        return "stop"
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is {kind(value)}, expected text")
    try:
        reason = finish_reason(value)
    except UnknownFinishReason as error:
        raise UserError(f"{where}: {error}") from None
    if reason not in ("stop", "length"):
        raise Unusable(f"the completion ended with {value!r}")
    return reason


def read_ids(where: str, value: Any, name: str) -> list[int] | None:
    """Token ids, or None; whether they are the text's is checked where the tokenizer is."""
    if value is None:
        return None
    if not isinstance(value, list) or any(
        type(one) is not int or not 0 <= one <= LARGEST_INT for one in value
    ):
        raise UserError(f"{where}: {name} is {kind(value)}, expected token ids (whole numbers from 0 on)")
    return value
