"""Runs chat templates, which are untrusted programs: in jinja's sandbox, within a time and a size, on a fixed day.

A template sees what transformers' own renderer shows it, but for the date: templates that write it (Llama 3.2, SmolLM3)
would give another prompt every day, so the day is always DAY."""

import ctypes
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

DAY = datetime(2026, 1, 1)
SECONDS = 10.0  # that the templates of one call may run
CHARACTERS = 2**24  # that a conversation may become, or a value within a template
_deadlines: dict[int, float] = {}  # of the threads that run a template
_lock = threading.Lock()
_watch: threading.Thread | None = None


class TookTooLong(Exception):
    """A template ran for longer than SECONDS."""


def render(
    template: str, conversations: Sequence[list[dict[str, str]]], opened: bool, names: Mapping[str, Any]
) -> list[str]:
    """The text of each conversation, with the assistant's turn `opened` behind it; `names` are the special tokens.
    Raises whatever the template raises, SecurityError where it makes too much, and TookTooLong."""
    program = _compiled(template)
    texts = []
    with _time_limit():
        for messages in conversations:
            parts, size = [], 0
            for part in program.generate(
                messages=messages, tools=None, documents=None, add_generation_prompt=opened, **names
            ):
                size += len(part)
                _check_size(size)
                parts.append(part)
            texts.append("".join(parts))
    return texts


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja's sandbox, in which no value grows beyond CHARACTERS."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        sizes = [len(side) if isinstance(side, str | list | tuple) else side for side in (left, right)]
        if operator == "**" and any(isinstance(size, int) and abs(size) > 4096 for size in sizes):
            _check_size(CHARACTERS + 1)
        if operator in "+*" and any(isinstance(side, str | list | tuple) for side in (left, right)):
            _check_size(sizes[0] + sizes[1] if operator == "+" else sizes[0] * sizes[1])
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, called: Any, *args: Any, **kwargs: Any) -> Any:
        _check_arguments(args, kwargs)
        method = getattr(called, "__wrapped__", called)  # jinja wraps `format`
        if isinstance(text := getattr(method, "__self__", None), str):
            _check_method(method.__name__, text, (*args, *kwargs.values()))
        return super().call(context, called, *args, **kwargs)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for masks, which we do not make: its content as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own way)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check_size(size: float) -> None:
    if size > CHARACTERS:
        raise SecurityError(f"it makes a text of more than {CHARACTERS:,} characters")


def _check_arguments(args: Sequence[Any], named: Mapping[str, Any]) -> None:
    for value in (*args, *named.values()):
        if isinstance(value, int):  # a width, a count
            _check_size(abs(value))


def _check_format(text: str, values: Sequence[Any]) -> None:
    """Widths and precisions within a format, or beside it."""
    for width in re.findall(r"\d+", text):
        _check_size(CHARACTERS + 1 if len(width) > 9 else int(width))
    if "*" in text or "{" in text:
        _check_arguments(values, {})


def _check_method(name: str, text: str, args: Sequence[Any]) -> None:
    """What a method of a text may make of it, before it makes it."""
    sizes = [
        len(value) if isinstance(value, str) else value for value in args if isinstance(value, str | int)
    ]
    if name in ("format", "format_map"):
        _check_format(text, args)
    elif name == "replace" and len(sizes) > 1 and isinstance(args[0], str):
        _check_size(len(text) + text.count(args[0]) * sizes[1])
    elif name == "expandtabs":
        _check_size(len(text) + text.count("\t") * (sizes or [8])[0])
    elif name == "join" and args and isinstance(args[0], list | tuple):
        _check_size(sum(len(text) + len(str(part)) for part in args[0]))
    elif name == "translate":
        raise SecurityError("it translates characters, which is not allowed here")


def _checked(name: str, function: Any) -> Any:
    """One of jinja's filters, in which no width or count makes too much."""

    @wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        _check_arguments(args, named)
        texts = [value for value in args if isinstance(value, str)]
        if name == "format" and texts:
            _check_format(texts[0], args[1:])
        elif name == "replace" and texts:
            _check_method(name, texts[0], texts[1:])
        elif name == "join":
            lists = [value for value in args if isinstance(value, list | tuple)]
            _check_method(name, (texts or [""])[0], lists)
        return function(*args, **named)

    return call


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    options = {"ensure_ascii": False} | options
    return json.dumps(value, indent=indent, **options)


def _joined(parts: Sequence[Any]) -> str:
    """jinja's `~`, which the sandbox does not intercept."""
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    sandbox.filters["tojson"] = _to_json
    sandbox.filters |= {name: _checked(name, function) for name, function in sandbox.filters.items()}
    del sandbox.globals["lipsum"]  # makes texts of any length
    sandbox.globals |= {"raise_exception": _raise, "strftime_now": DAY.strftime}
    template = sandbox.from_string(source)
    template.root_render_func.__globals__["str_join"] = _joined
    return template


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raises TookTooLong in this thread when what is within runs for too long."""
    global _watch
    me = threading.get_ident()
    with _lock:
        _deadlines[me] = time.monotonic() + SECONDS
        if _watch is None or not _watch.is_alive():  # a fork has no threads
            _watch = threading.Thread(target=_watching, name="croco-templates", daemon=True)
            _watch.start()
    try:
        yield
    finally:
        with _lock:
            _deadlines.pop(me, None)


def _watching() -> None:
    while True:
        time.sleep(0.5)
        with _lock:
            for thread in [one for one, end in _deadlines.items() if time.monotonic() > end]:
                del _deadlines[thread]
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread), ctypes.py_object(TookTooLong)
                )
