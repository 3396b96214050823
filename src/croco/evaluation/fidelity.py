"""Is a completion in the language of its prompt? Judged offline; short texts are not judged.

The identifier chooses among the run's languages only, so a completion in a language outside the run counts as
whichever of them it resembles most, or as unknown when it resembles none.
"""

from __future__ import annotations

from collections.abc import Sequence

from croco.languages import identify

RIGHT, WRONG, UNKNOWN = "right-language", "wrong-language", "unknown"
MIN_LETTERS = 20  # a name or a number says nothing about the language it stands in


def language_mode(completion: str, language: str, among: Sequence[str]) -> str:
    """ "right-language", "wrong-language", or "unknown" for a text too short or too mixed to judge."""
    if sum(character.isalpha() for character in completion) < MIN_LETTERS:
        return UNKNOWN
    found = identify(completion, among)
    if found is None:
        return UNKNOWN
    return RIGHT if found == language else WRONG
