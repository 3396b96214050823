"""Guards: which completions may not become candidates, which pairs may not stand, and what a pair should be
marked with.

Each guard drops, flags or is off. What is dropped enters no pool's mean or std and is in the ledger with its
reason. What is flagged stays: a pair that holds such a completion says so in its `flags`, and the ledger counts
it. A score that is no number is always dropped, because it would poison every mean it enters.

A completion cut at the token limit has no end to learn from; an empty one teaches nothing; a repeated one would
weigh twice. Repetition is judged on the text and on the text in lower case with its white space made one ("near
duplicate"). A language is judged by the offline identifier on the first 1,000 characters, with a confidence of
0.9, and never for a text with few letters; as a flag only on the completions that are picked, because it takes
a third of a millisecond.

Shapes: R rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from croco import languages
from croco.storage.schemas import FINISH_REASONS

NOT_FINITE = "score is not finite"
EMPTY = "completion is empty"
CUT = "cut at the token limit"
TOO_LONG = "prompt and completion are too long to train on"
WRONG_LANGUAGE = "wrong language"
DUPLICATE = "duplicate of an earlier completion"
NEAR_DUPLICATE = "near duplicate of an earlier completion"
SMALL_GAP = "score gap is too small"
SAME_TEXT = "chosen and rejected are the same text in two languages"
LENGTH_RATIO = "chosen and rejected differ too much in length"

CUT_REASONS = [name for name, meaning in FINISH_REASONS.items() if meaning == "length"]
IDENTIFIED_CHARACTERS, CONFIDENCE = 1000, 0.9


@dataclass(frozen=True)
class Guards:
    """Actions ("drop", "flag", "off") and their limits; `max_tokens` is of prompt and completion, None for no
    limit.
    """

    cut: str = "drop"
    empty: str = "drop"
    too_long: str = "drop"
    wrong_language: str = "flag"
    duplicate: str = "drop"
    near_duplicate: str = "drop"
    score_gap: str = "off"
    length_ratio: str = "off"
    max_tokens: int | None = None
    min_letters: int = 20
    min_score_gap: float = 0.0
    max_length_ratio: float = 3.0


@dataclass(frozen=True)
class Traits:
    """What the guards need of R completions once their text has left memory: `wrong` holds, per guard of the
    text, a flag; `text` a hash of the text, `outline` one that near duplicates share (0: not known),
    `characters` its length.
    """

    wrong: dict[str, NDArray[np.bool_]]
    text: NDArray[np.uint64]
    outline: NDArray[np.uint64]
    characters: NDArray[np.int32]

    def take(self, rows: NDArray[np.int64]) -> Traits:
        return Traits(
            {name: flags[rows] for name, flags in self.wrong.items()},
            self.text[rows],
            self.outline[rows],
            self.characters[rows],
        )

    @classmethod
    def joined(cls, parts: Sequence[Traits]) -> Traits:
        return cls(
            {name: np.concatenate([part.wrong[name] for part in parts]) for name in parts[0].wrong},
            np.concatenate([part.text for part in parts]),
            np.concatenate([part.outline for part in parts]),
            np.concatenate([part.characters for part in parts]),
        )


def traits(rows: pa.Table, guards: Guards, among: Sequence[str]) -> Traits:
    """The traits of completions (columns completion, finish_reason, prompt_tokens, completion_tokens,
    language); where a language is to be dropped, it is identified among the given ones.
    """
    table = pl.DataFrame(pl.from_arrow(rows))
    text = pl.col("completion")
    tokens = pl.col("prompt_tokens") + pl.col("completion_tokens")
    too_long = (tokens > guards.max_tokens).fill_null(False) if guards.max_tokens else pl.lit(False)
    found = table.select(
        empty=text.str.strip_chars() == "",
        cut=pl.col("finish_reason").str.to_lowercase().is_in(CUT_REASONS).fill_null(False),
        too_long=too_long,
        text=text.hash(),
        characters=text.str.len_chars().cast(pl.Int32),
    )
    wrong = {name: found[name].to_numpy() for name in ("empty", "cut", "too_long")}
    if guards.wrong_language == "drop":
        spoken = table.select("completion", "language").iter_rows()
        wrong["wrong_language"] = np.array(
            [wrong_language(one, code, among, guards.min_letters) is not None for one, code in spoken],
            np.bool_,
        )
    known = guards.near_duplicate != "off"
    outline = outlines(rows["completion"]) if known else np.zeros(len(table), np.uint64)
    return Traits(wrong, found["text"].to_numpy(), outline, found["characters"].to_numpy())


def wrong_language(text: str, language: str, among: Sequence[str], min_letters: int) -> str | None:
    """The language a text is in when that is another than it should be; None when right, short or not sure."""
    if (
        not languages.identifiable(language)
        or len(re.findall(r"[^\W\d_]", text[:IDENTIFIED_CHARACTERS])) < min_letters
    ):
        return None
    found = languages.identify(text[:IDENTIFIED_CHARACTERS], among, CONFIDENCE)
    return None if found is None or languages.same_to_identifier(found, language) else found


def normalised(texts: pl.Series) -> pl.Series:
    """Texts in lower case, each run of white space one space, none at the ends."""
    return texts.str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()


# outlines -------------------------------------------------------------------------------------------------

_WINDOW, _LETTERS = 40, 8  # bytes looked at on either end, and how many of their letters make the outline
# each byte's letter, 0 for those left out: white space, all bytes of non-ASCII characters, and k and i, which are the
# lower case of non-ASCII characters too (K, İ). What is left is equal wherever the normalised texts are equal.
_FOLDED = np.array(
    [ord(chr(b).lower()) if 33 <= b < 127 and chr(b) not in "kKiI" else 0 for b in range(256)], np.uint8
)


def outlines(texts: pa.ChunkedArray) -> NDArray[np.uint64]:
    """A number per text that is the same for near duplicates, from the letters at its ends; 0 where they are too few.

    Cheap on purpose: only texts of one prompt with the same outline, and those without, need be normalised.
    """
    return np.concatenate([_outlines(chunk) for chunk in texts.chunks] or [np.empty(0, np.uint64)])


def _outlines(chunk: pa.Array) -> NDArray[np.uint64]:
    chunk = chunk.cast(pa.large_string())
    _, offsets, data = chunk.buffers()
    if data is None or not len(chunk):
        return np.zeros(len(chunk), np.uint64)
    edges = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
    content = np.pad(np.frombuffer(data, np.uint8)[edges[0] : edges[-1]], _WINDOW)
    windows = np.lib.stride_tricks.sliding_window_view(content, _WINDOW)
    begin, end, steps = edges[:-1] - edges[0], edges[1:] - edges[0], np.arange(_WINDOW)
    inside = steps < (end - begin)[:, None]
    first = _first_letters(windows[begin + _WINDOW], inside)
    last = _first_letters(windows[end][:, ::-1], inside)
    mixed = first * np.uint64(0x9E3779B97F4A7C15) ^ last * np.uint64(0xC2B2AE3D27D4EB4F)
    return np.where((first != 0) & (last != 0), mixed, 0).astype(np.uint64)


def _first_letters(window: NDArray[np.uint8], inside: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """The first letters of each row as one number, 0 where there are too few, (R,)."""
    letters = _FOLDED[window]
    kept = (letters != 0) & inside
    kept &= np.cumsum(kept, axis=1, dtype=np.int8) <= _LETTERS
    enough = kept.sum(axis=1, dtype=np.int8) == _LETTERS
    kept[~enough] = False
    found = np.zeros(len(window), np.uint64)
    found[enough] = letters[kept].reshape(-1, _LETTERS).view(np.uint64)[:, 0]
    return found


# verdicts -------------------------------------------------------------------------------------------------

# in this order: a completion has one reason, the first that applies
REASONS = {
    "not_finite": NOT_FINITE,
    "empty": EMPTY,
    "cut": CUT,
    "too_long": TOO_LONG,
    "wrong_language": WRONG_LANGUAGE,
    "duplicate": DUPLICATE,
    "near_duplicate": NEAR_DUPLICATE,
}
NAMES = list(REASONS)
CANDIDATE = -1
Texts = Callable[[NDArray[np.int64]], pl.Series]  # the texts of some of the rows


@dataclass(frozen=True)
class Verdicts:
    """Per completion the number of the guard that dropped it in NAMES, or CANDIDATE, int8 (R,); and the flags
    that it would bring into a pair, bool (R,) per guard.
    """

    dropped: NDArray[np.int8]
    flags: dict[str, NDArray[np.bool_]]


def judge(
    group: NDArray[np.integer], score: NDArray[np.float32], found: Traits, guards: Guards, texts: Texts
) -> Verdicts:
    """Which completions are no candidates; rows come sorted by `group` (prompt and language) and sample.

    Only completions that pass the other guards can make a later one a duplicate.
    """
    dropped = np.full(len(score), CANDIDATE, np.int8)
    flags: dict[str, NDArray[np.bool_]] = {}
    _apply(dropped, flags, "not_finite", "drop", ~np.isfinite(score))
    for name, flagged in found.wrong.items():
        _apply(dropped, flags, name, getattr(guards, name), flagged)
    if guards.duplicate != "off":
        sound = dropped == CANDIDATE
        _apply(dropped, flags, "duplicate", guards.duplicate, _repeated(group, found.text, sound))
    if guards.near_duplicate != "off":
        sound = (dropped == CANDIDATE) & ~flags.get("duplicate", np.zeros_like(dropped, np.bool_))
        alike = _alike(group, found.outline, sound)
        if len(alike):
            folded = np.zeros(len(score), np.uint64)
            folded[alike] = normalised(texts(alike)).hash().to_numpy()
            marked = np.zeros_like(sound)
            marked[alike] = True
            repeated = _repeated(group, folded, marked)
            _apply(dropped, flags, "near_duplicate", guards.near_duplicate, repeated)
    return Verdicts(dropped, flags)


def _apply(
    dropped: NDArray[np.int8],
    flags: dict[str, NDArray[np.bool_]],
    name: str,
    action: str,
    found: NDArray[np.bool_],
) -> None:
    if action == "drop":
        dropped[found & (dropped == CANDIDATE)] = NAMES.index(name)
    elif action == "flag":
        flags[name] = found


def _repeated(
    group: NDArray[np.integer], value: NDArray[np.uint64], among: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Rows whose value an earlier row of the group has, looking only at the rows `among`, (R,)."""
    rows = np.flatnonzero(among)
    repeated = np.zeros(len(group), np.bool_)
    repeated[rows] = ~pl.Series(_within(group[rows], value[rows])).is_first_distinct().to_numpy()
    return repeated


def _alike(
    group: NDArray[np.integer], outline: NDArray[np.uint64], sound: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Sound rows that may have a near duplicate: another of the group has their outline, or one has none."""
    rows = np.flatnonzero(sound)
    group, outline = group[rows], outline[rows]
    shared = pl.Series(_within(group, outline)).is_duplicated().to_numpy()
    bare = outline == 0
    return rows[shared | np.isin(group, group[bare])] if bare.any() else rows[shared]


def _within(group: NDArray[np.integer], value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hashes made the group's own: equal for equal hashes of one group, and by chance once in 10^19."""
    return value + (group.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
