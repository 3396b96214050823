"""Guards: which completions may not become candidates, which pairs are dropped, and what is marked.

Each guard drops, flags or is off. What is dropped enters no pool's mean or std and is in the ledger; what is flagged is
named in its pair's `flags`. A score that is not finite is always dropped. A near duplicate is the same text in lower
case with its white space made one and without invisible characters. A language is judged by the offline identifier on
the first 1,000 characters, with a confidence of 0.9, and never of a text with few letters; as a flag only for the
completions that are picked, because it takes a third of a millisecond.

Shapes: R rows."""

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from croco import languages
from croco.config.arms import Guards
from croco.storage.schemas import FINISH_REASONS, REFERENCE

SMALL_GAP = "score gap is too small"
SAME_TEXT = "chosen and rejected are the same text in two languages"
LENGTH_RATIO = "chosen and rejected differ too much in length"
# in this order: a completion has one reason, the first that applies
REASONS = {
    "not_finite": "score is not finite",
    "empty": "completion is empty",
    "cut": "cut at the token limit",
    "too_long": "prompt and completion are too long to train on",
    "wrong_language": "wrong language",
    "duplicate": "duplicate of an earlier completion",
    "near_duplicate": "near duplicate of an earlier completion",
}
REASON = pl.Enum(list(REASONS.values()))
CUT_REASONS = [name for name, meaning in FINISH_REASONS.items() if meaning == "length"]
IDENTIFIED_CHARACTERS, CONFIDENCE = 1000, 0.9

Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]


# traits of a text: all that is kept of it until it is picked -------------------------------------------------------

TRAITS = ("empty", "cut", "too_long", "wrong_language", "outline")


def traits(
    texts: pl.DataFrame, guards: Guards, known: Sequence[str], max_tokens: int | None = None
) -> pl.DataFrame:
    """The columns TRAITS of completions (completion, finish_reason, prompt_tokens, completion_tokens, language): a flag
    per guard of a single text, and an `outline` (uint64) that near duplicates share, 0 where unknown. Languages are
    told apart among `known`, where a wrong one is dropped; `max_tokens` is of prompt and completion."""
    tokens = pl.col("prompt_tokens") + pl.col("completion_tokens")
    outline = pl.Series("outline", outlines(texts["completion"]))
    wrong = pl.Series([False], dtype=pl.Boolean).new_from_index(0, texts.height)
    if guards.wrong_language == "drop":
        spoken = texts.select("completion", pl.col("language").cast(pl.String)).iter_rows()
        wrong = pl.Series(
            [is_wrong_language(text, code, known, guards.min_letters) for text, code in spoken],
            dtype=pl.Boolean,
        )
    bare = (outline == 0).arg_true()  # only a text without an outline can be empty
    empty = np.zeros(texts.height, np.bool_)
    empty[bare.to_numpy()] = (normalised(texts["completion"].gather(bare)) == "").to_numpy()
    return texts.select(
        empty=pl.Series(empty),
        cut=pl.col("finish_reason").str.to_lowercase().is_in(CUT_REASONS).fill_null(False),
        too_long=(tokens > max_tokens).fill_null(False) if max_tokens else pl.lit(False),
        wrong_language=wrong,
        outline=outline,
    )


def is_wrong_language(text: str, language: str, known: Sequence[str], min_letters: int) -> bool:
    """Whether a text is in another language than it should be; False when it is short or the identifier not sure."""
    if not languages.identifiable(language):
        return False
    identified = languages.identify(text[:IDENTIFIED_CHARACTERS], known, CONFIDENCE, min_letters)
    return languages.language_mode(identified, language) == languages.WRONG


def normalised(texts: pl.Series) -> pl.Series:
    """Texts in lower case, without invisible characters, each run of white space one space, none at the ends."""
    return (
        texts.str.to_lowercase()
        .str.replace_all(r"[\p{Cf}\p{Default_Ignorable_Code_Point}\x{2800}]", "")
        .str.replace_all(r"\s\s+|[\s--\x20]", " ")
        .str.strip_chars()
    )


_WINDOWS, _LETTERS = (24, 400), 8  # bytes looked at on either end, and how many letters make an outline
# each byte's letter, 0 for those left out: white space, all bytes of non-ASCII characters, and k and i, which are the
# lower case of non-ASCII characters too (K, İ). What is left is equal wherever the normalised texts are equal.
_FOLDED = bytes(ord(chr(b).lower()) if 33 <= b < 127 and chr(b) not in "kKiI" else 0 for b in range(256))
_LEFT_OUT = bytes(b for b in range(256) if not _FOLDED[b])


def outlines(texts: pl.Series, end: bool = True) -> NDArray[np.uint64]:
    """A number per text that near duplicates share: its last letters (or its first), 0 for too few. Cheap on purpose:
    only texts of one prompt with the same outline, and those without, need be compared."""
    content = texts.cast(pl.Binary)
    outline = np.zeros(len(texts), np.uint64)
    for window in _WINDOWS:  # most texts have enough letters in the first one
        bare = np.flatnonzero(outline == 0)
        some = (content if len(bare) == len(content) else content.gather(bare)).bin
        outline[bare] = _letters(some.tail(window) if end else some.head(window), end)
    return outline


def _letters(windows: pl.Series, end: bool) -> NDArray[np.uint64]:
    """The first or last letters of each window as one number, 0 where there are too few, (R,)."""
    arrow = windows.to_arrow().cast(pa.large_binary())
    _, offsets, data = arrow.buffers()
    if not len(arrow) or data is None:
        return np.zeros(len(arrow), np.uint64)
    edges = np.frombuffer(offsets, np.int64)[arrow.offset : arrow.offset + len(arrow) + 1]
    content = bytes(data)[edges[0] : edges[-1]]
    kept = np.frombuffer(content.translate(_FOLDED), np.uint8) != 0
    num = np.add.reduceat(np.append(kept, False), edges[:-1] - edges[0], dtype=np.int64)
    before = np.concatenate([[0], np.cumsum(np.where(np.diff(edges) > 0, num, 0))])
    letters = np.frombuffer(content.translate(_FOLDED, _LEFT_OUT) + bytes(_LETTERS), np.uint8)
    # the eight bytes from any place on as one number: a view, whose rows overlap
    numbers = np.lib.stride_tricks.sliding_window_view(letters, _LETTERS)
    start = before[1:] - _LETTERS if end else before[:-1]
    enough = np.diff(before) >= _LETTERS
    return np.where(enough, numbers[np.where(enough, start, 0)].copy().view(np.uint64)[:, 0], np.uint64(0))


# verdicts ----------------------------------------------------------------------------------------------------------


def judge(
    rows: pl.DataFrame, guards: Guards, texts: Callable[[Rows], pl.Series] | None
) -> tuple[pl.Series, dict[str, Mask]]:
    """Why completions are no candidates (REASON, null where they are), and per guard those that it flags, (R,) each.

    `rows` are sorted by prompt, language and sample, with the columns score and TRAITS; `texts` gives some texts,
    without it only scores are judged. A completion that no guard dropped makes a later one a duplicate; gold ones are
    not judged."""
    reason = np.full(rows.height, -1, np.int8)
    flags: dict[str, Mask] = {}

    def apply(name: str, hit: Mask) -> None:
        action = "drop" if name == "not_finite" else getattr(guards, name)
        if action == "drop":
            reason[hit & (reason < 0)] = list(REASONS).index(name)
        elif action == "flag":
            flags[name] = hit

    apply("not_finite", ~rows["score"].is_finite().to_numpy())
    if texts is not None:
        for name in ("empty", "cut", "too_long", "wrong_language"):
            apply(name, rows[name].fill_null(False).to_numpy())
        if guards.duplicate != "off" or guards.near_duplicate != "off":
            own = (rows["sample_id"] != REFERENCE).to_numpy()
            group = rows.select(pl.struct("prompt_id", "language").rle_id()).to_series().to_numpy()
            outline = rows["outline"].fill_null(0).to_numpy()
            alike = _alike(group, outline, np.flatnonzero(own & (reason < 0)))
            text = texts(alike)
            apply("duplicate", _repeated(group, alike, text))
            if guards.near_duplicate != "off":
                sound = (reason < 0) & ~flags.get("duplicate", np.zeros_like(own))
                first = outlines(text, end=False)  # of those with the same last letters
                outline = outline.copy()
                outline[alike] *= first  # 0 where either is not known
                nearly = _alike(group, outline, alike[sound[alike]])
                text = normalised(text.gather(np.searchsorted(alike, nearly)))
                apply("near_duplicate", _repeated(group, nearly, text))
    names = pl.Series(reason).cast(pl.Int16)
    return pl.Series(list(REASONS.values()), dtype=REASON).gather(
        names.set(names < 0, None).cast(pl.UInt32)
    ), flags


def _repeated(group: NDArray[np.uint32], rows: Rows, text: pl.Series) -> Mask:
    """Those of the rows whose text an earlier one of them has in its group, as a mask of all rows, (R,)."""
    repeated = np.zeros(len(group), np.bool_)
    repeated[rows] = ~pl.Series(_within(group[rows], text.hash().to_numpy())).is_first_distinct().to_numpy()
    return repeated


def _alike(group: NDArray[np.uint32], outline: NDArray[np.uint64], rows: Rows) -> Rows:
    """Those of the rows that may have a near duplicate: another of the group has their outline, or one has none."""
    group, outline = group[rows], outline[rows]
    shared = pl.Series(_within(group, outline)).is_duplicated().to_numpy()
    bare = outline == 0
    return rows[shared | np.isin(group, group[bare])] if bare.any() else rows[shared]


def _within(group: NDArray[np.uint32], value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hashes made the group's own: equal for equal hashes of one group, and by chance once in 10^19."""
    return value + (group.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
