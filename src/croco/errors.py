"""The errors a person can act on.

Everything else propagates as it is. Nothing is caught here, only named, so that the command line can print one sentence
for bad input and a traceback for a mistake of ours.
"""

from __future__ import annotations

import re
import sys

# control characters (escape codes), marks that reorder the text after them, and halves of surrogate pairs
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_ENDLESS = re.compile(r"\S{1000,}")  # a value that nobody meant as a name or a path


class UserError(Exception):
    """Bad input: one sentence that names the file, row or key, what was found and what was expected (exit code 2)."""

    def __str__(self) -> str:
        return _ENDLESS.sub(lambda match: f"{match[0][:100]}…", super().__str__())


class Refused(UserError):
    """A chat template refuses one conversation, in its own words: what cannot be asked goes to the ledger."""


class StaleStage(UserError):
    """A finished or unfinished stage was made with other settings than the recipe now gives."""


def one_line(error: BaseException, most: int = 200) -> str:
    """What an exception says, on one line of at most so many characters; its kind where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def printable(text: str) -> str:
    """Text of a model, file or server for a terminal or a log: what could steer the terminal is written out."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def notice(line: str) -> None:
    """A line beside the results, for the person at the terminal."""
    print(printable(line), file=sys.stderr, flush=True)
