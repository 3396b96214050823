"""Is a completion in the language of its prompt? Judged offline; short texts are not judged.

The identifier chooses among the run's languages only, so a completion in a language outside the run counts as
whichever of them it resembles most, or as unknown when it resembles none. With a single language there is nothing to
choose from, and every completion is unknown. Varieties of one language (pt and pt-BR, nb and no) are not told apart: a
completion in one is right for the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from croco.languages import identify, same_to_identifier

RIGHT, WRONG, UNKNOWN = "right-language", "wrong-language", "unknown"
MIN_LETTERS = 20  # a name or a number says nothing about the language it stands in


def found_language(completion: str, among: Sequence[str]) -> str | None:
    """The language a completion is in; None for a text too short or too mixed to judge."""
    if sum(character.isalpha() for character in completion) < MIN_LETTERS:
        return None
    return identify(completion, among)


def found_languages(
    completions: Iterable[str], among: Sequence[str], expected: Iterable[str] | None = None
) -> list[str | None]:
    """`found_language` of many completions, each text looked at once; the expected language itself where the one found
    is a variety of it.
    """
    known: dict[str, str | None] = {}
    found = []
    for completion in completions:
        if completion not in known:
            known[completion] = found_language(completion, among)
        found.append(known[completion])
    if expected is None:
        return found
    return [
        code if language is not None and same_to_identifier(language, code) else language
        for language, code in zip(found, expected, strict=True)
    ]


def language_mode(found: str | None, language: str) -> str:
    """ "right-language", "wrong-language", or "unknown", of a completion found to be in a language."""
    if found is None:
        return UNKNOWN
    return RIGHT if same_to_identifier(found, language) else WRONG
