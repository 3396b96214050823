"""Tables as the report shows them: words, and numbers with their intervals.

`render.py` writes a table as Markdown, LaTeX or for a terminal, `templates/macros.html` as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from croco import languages
from croco.stages.evaluate.results import GROUPS
from croco.stages.evaluate.stats import TOO_FEW, Interval

MINUS = "−"


@dataclass(frozen=True)
class Unit:
    """How a number is written: times `factor`, with so many decimals, a plus where it is a change, and a suffix."""

    factor: float = 1
    digits: int = 0
    signed: bool = False
    suffix: str = ""

    def plain(self, value: float) -> str:
        """The number without its suffix, with a real minus sign, and a zero without any."""
        text = f"{self.factor * value:{'+' if self.signed else ''}.{self.digits}f}"
        return (text.lstrip("+-") if float(text) == 0 else text).replace("-", MINUS)

    def text(self, value: float) -> str:
        return self.plain(value) + self.suffix


PERCENT, POINTS = Unit(100), Unit(100, signed=True)
SCORE, SCORE_CHANGE = Unit(digits=2), Unit(digits=2, signed=True)
SHARE = Unit(100, suffix=" %")


@dataclass(frozen=True)
class Number:
    """A value with its interval, and what to know of it."""

    interval: Interval
    unit: Unit
    n: str = ""  # what it rests on, where that is not the same for the whole table: "3 of 24"
    flags: tuple[str, ...] = ()  # "better", "worse", "not-resolved", "best"
    note: str = ""

    @property
    def text(self) -> str:
        return self.unit.text(self.interval.value)

    def ends(self, between: str = ", ") -> str:
        """ "58, 64", or that there are too few prompts for an interval."""
        if not self.interval.known:
            return TOO_FEW
        return f"{self.unit.plain(self.interval.low)}{between}{self.unit.plain(self.interval.high)}"

    @property
    def with_interval(self) -> str:
        """ "61 [58, 64]"."""
        return f"{self.text} [{self.ends()}]" + (f" n = {self.n}" if self.n else "")

    @property
    def with_half_width(self) -> str:
        """ "61 ±3": half the width of the interval, which need not be symmetric; "61 (few)" without one."""
        if not self.interval.known:
            return f"{self.text} (few)"
        half = Unit(self.unit.factor, self.unit.digits).plain((self.interval.high - self.interval.low) / 2)
        return f"{self.text} ±{half}"


Entry = str | Number | tuple[Number, ...] | None  # several numbers stand beneath each other


@dataclass(frozen=True)
class Table:
    """Headings and rows; the first `words` columns are words, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    words: int = 1
    title: str = ""
    blocks: Sequence[tuple[str, int]] = ()  # headings over so many of the columns of numbers


@dataclass(frozen=True)
class Part:
    """A part of the page: paragraphs of Markdown, then curves and tables."""

    name: str
    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    panels: list[Any] = field(default_factory=list)  # `curves.Panel`


def numbers(entry: Entry) -> tuple[Number, ...]:
    """The numbers of an entry; none of a text."""
    return (entry,) if isinstance(entry, Number) else entry if isinstance(entry, tuple) else ()


def temperature_name(temperature: float) -> str:
    """ "greedy" for 0, else "T = 0.7"."""
    return "greedy" if temperature == 0 else f"T = {temperature:g}"


def scope_name(scope: str) -> str:
    """A group as it is, a language with its English name."""
    return scope if scope in GROUPS else languages.name(scope)


def duration(seconds: float) -> str:
    """ "48 s", "3 min 20 s", "5 h 12 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def enumerate_words(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
