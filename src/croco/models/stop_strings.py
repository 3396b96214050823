"""Stop strings: where a completion ends because its text does.

A completion ends with the first token after which its text contains a stop string. Kept are the tokens whose text lies
wholly before the string, so the ids are whole tokens that were sampled. What is kept follows from the drawn ids alone.
Leaves out stop strings across the prompt's end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from croco.models.chat_template import special_ids
from croco.models.protocols import Completion

LOOK_EVERY = 8  # tokens: a completion runs on by fewer than this after its end, and is cut


@dataclass(frozen=True)
class Stops:
    """Stop strings (at least one, none empty) and the tokenizer that makes text of ids."""

    tokenizer: Any
    strings: tuple[str, ...]

    def near_end(self, ids: Sequence[int]) -> bool:
        """Whether a stop string is in the latest tokens, only for ending early. Text from the middle may begin with
        half a character or lack a space, so a find is looked at again in all."""
        reach = LOOK_EVERY + 4 * max(map(len, self.strings))  # a character is at most four tokens
        return self._ended(self._text(ids[-reach:])) and self._ended(self._text(ids))

    def cut(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """(tokens kept, tokens drawn until a string was whole), or None when the text holds no stop string."""
        if not self._ended(self._text(ids)):
            return None
        few, drawn = 0, len(ids)  # the text of `few` tokens holds none, that of `drawn` one
        while drawn - few > 1:
            middle = (few + drawn) // 2
            few, drawn = (few, middle) if self._ended(self._text(ids[:middle])) else (middle, drawn)
        whole = self._text(ids[:drawn])
        before = whole[: min(at for string in self.strings if (at := whole.find(string)) >= 0)]
        kept = drawn - 1
        while not before.startswith(self._text(ids[:kept])):
            kept -= 1
        return kept, drawn

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _ended(self, text: str) -> bool:
        return any(string in text for string in self.strings)


def ends_of(tokenizer: Any, strings: Sequence[str]) -> set[int]:
    """Those of the strings that are special tokens, which no text of a completion shows: they end it as tokens."""
    known = special_ids(tokenizer) if strings and tokenizer is not None else {}
    return {known[string] for string in strings if string in known}


def finished(ids: list[int], reason: str, seed: int, stops: Stops | None) -> Completion:
    """The completion of drawn ids (without an end token) that ended for a reason, cut before a stop string."""
    cut = stops.cut(ids) if stops is not None else None
    if cut is None:
        return Completion(ids, reason, seed)
    kept, drawn = cut
    return Completion(ids[:kept], "stop", seed, num_tokens=drawn)
