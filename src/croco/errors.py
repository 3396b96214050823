"""The errors a person can act on.

Everything else propagates as it is. Nothing is caught here, only named, so that the command line can print one sentence
for bad input and a traceback for a mistake of ours.
"""

from __future__ import annotations


class UserError(Exception):
    """Bad input: one sentence that names the file, row or key, what was found and what was expected (exit code 2)."""


class Refused(UserError):
    """A chat template refuses one conversation, in its own words: what cannot be asked goes to the ledger."""


class StaleStage(UserError):
    """A finished or unfinished stage was made with other settings than the recipe now gives."""
