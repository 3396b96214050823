"""What is wrong with a translation, as far as a program can tell, as a reason for the ledger: its kind, a colon,
details.

Texts with few letters are not judged by language or length. Adequacy and fluency are left out: they need a model."""

import zlib
from collections.abc import Collection, Sequence

from croco.languages import MIN_LETTERS, count_letters, identify, same_to_identifier
from croco.stages.translate.protect import KINDS, items, prose
from croco.storage.provenance import shown

CONFIDENCE = 0.9  # of the language identifier, before a translation is thrown away for it
MIN_CHARACTERS = 60  # a shorter text may grow or shrink by more than any ratio
SPELLED = {str(number) for number in range(21)}  # numbers that may be written in words
MIN_LOOP_BYTES = 200  # a shorter text is hardly a loop


def fault(
    source: str,
    translation: str,
    language: str,
    candidates: Sequence[str],
    checks: Collection[str],
    length_ratios: tuple[float, float],
) -> str | None:
    """The first thing wrong with the translation of one turn into `language`, or None. `candidates` are the languages
    it may be mistaken for, `checks` those that apply, `length_ratios` the least and greatest length relative to the
    source."""
    if source.strip() and not translation.strip():
        return "empty translation"
    if "items" in checks and (reason := changed_items(source, translation)):
        return reason
    if "numbers" in checks and (reason := lost_numbers(source, translation)):
        return reason
    if "repetition" in checks and (reason := loop(source, translation)):
        return reason
    if "length" in checks and (reason := off_length(source, translation, *length_ratios)):
        return reason
    before, after = prose(source), prose(translation)
    if "copy" in checks and count_letters(before) >= MIN_LETTERS and _bare(before) == _bare(after):
        return "untranslated copy: the translation is the source"
    if "language" in checks:
        identified = identify(after, candidates, CONFIDENCE, MIN_LETTERS)
        if identified is not None and not same_to_identifier(identified, language):
            return f"wrong language: found {identified}, expected {language}"
    return None


def _bare(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalpha())


def changed_items(source: str, translation: str) -> str | None:
    """An item other than a number that does not occur equally often in both texts."""
    before, after = items(source), items(translation)
    for kind, item in before | after:
        count, count_after = before[kind, item], after[kind, item]
        if kind != "number" and count != count_after:
            return f"{KINDS[kind]} changed: {shown(item)} occurs {count}, then {count_after} times"
    return None


def lost_numbers(source: str, translation: str) -> str | None:
    """A number that occurs in the source more often than in the translation; those in `SPELLED` may become words."""
    before, after = items(source), items(translation)
    for (kind, item), count in before.items():
        if kind == "number" and item not in SPELLED and after[kind, item] < count:
            return f"number lost: {item} occurs {count}, then {after[kind, item]} times"
    return None


def loop(source: str, translation: str) -> str | None:
    """Whether the translation repeats itself as the source does not, by how well both compress."""
    packed = translation.encode()
    if len(packed) < MIN_LOOP_BYTES:
        return None
    after, before = _compression(packed), _compression(source.encode())
    if after > 2.4 and after > 1.5 * before:
        return f"repetition: it compresses {after:.1f} to 1, the source {before:.1f} to 1"
    return None


def _compression(text: bytes) -> float:
    return len(text) / len(zlib.compress(text))


def off_length(source: str, translation: str, least: float, greatest: float) -> str | None:
    """Whether the translation is shorter or longer than a translation is."""
    before, after = len(source), len(translation)
    short = after < least * before and before >= MIN_CHARACTERS
    if short or after > greatest * max(before, MIN_CHARACTERS):
        return f"length: {after} characters for {before}, expected {least:g} to {greatest:g} times as many"
    return None
