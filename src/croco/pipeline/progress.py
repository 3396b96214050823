"""Progress of long stages: on a terminal a bar with rate and time left, elsewhere (logs, CI) a line now and then."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

LINE_SECONDS = 30.0  # between two lines


class Progress(Protocol):
    def advance(self, n: int = 1) -> None:
        """Say that `n` more units are done."""


class _Bar:
    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def advance(self, n: int = 1) -> None:
        self._bar.advance(self._task, n)


class _Lines:
    """Counts, and from a thread of its own prints how far it is, whether or not anything moves."""

    open = 0  # how many count now

    def __init__(self, title: str, total: int, unit: str, done: int) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.since: tuple[float, int] | None = None  # when the first units were done, and how many were then
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._print, daemon=True)

    def advance(self, n: int = 1) -> None:
        self.done += n
        self.since = self.since or (time.monotonic(), self.done)

    def line(self, now: float) -> str:
        """`sample: 1,200 of 6,000 completions (20 %), 40.0 a second, 2 min left`. Loading and trials come before the
        first units are done, so the rate counts from there."""
        share = f" ({100 * self.done // self.total} %)" if self.total else ""
        line = f"{self.title}: {self.done:,} of {self.total:,} {self.unit}s{share}"
        began, first = self.since or (now, self.done)
        if self.done == first:
            return line
        rate = (self.done - first) / max(now - began, 1e-9)
        pace = f"{rate:,.1f} a second" if rate >= 1 else f"{60 * rate:,.1f} a minute"
        return f"{line}, {pace}, {duration((self.total - self.done) / rate)} left"

    def _print(self) -> None:
        while not self.ended.wait(LINE_SECONDS):
            print(self.line(time.monotonic()), file=sys.stderr, flush=True)


@contextmanager
def heartbeat(title: str) -> Iterator[None]:
    """Where there is no terminal, a line now and then for work that counts nothing."""
    ended, began = threading.Event(), time.monotonic()

    def beat() -> None:
        while not ended.wait(LINE_SECONDS):
            if not _Lines.open:
                print(f"{title}: since {duration(time.monotonic() - began)}", file=sys.stderr, flush=True)

    if not sys.stderr.isatty():
        threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def count_of(count: int, unit: str) -> str:
    """ "1 pair", "1,024 pairs"."""
    return f"{count:,} {unit}" if count == 1 else f"{count:,} {unit}s"


def duration(seconds: float) -> str:
    """Seconds for a person: `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def progress(title: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """A bar or lines from `done` to `total` units; the rate counts only what this process did."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with _bar(console, title, total, unit, done) as bar:
            yield bar
        return
    lines = _Lines(title, total, unit, done)
    lines.thread.start()
    _Lines.open += 1
    try:
        yield lines
    finally:
        _Lines.open -= 1
        lines.ended.set()
        lines.thread.join()


@contextmanager
def _bar(console: Any, title: str, total: int, unit: str, done: int) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed or 0:.1f} {unit}s/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        yield _Bar(bars, bars.add_task(f"{title:<24}", total=total, completed=done))
