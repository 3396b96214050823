"""Stop strings: where a completion that ran into one ends.

A stop string need not begin where a token begins. A completion is kept in whole tokens, so that the ids trained on are
ids that were sampled: the token in which the string begins is left out with it, its first characters too.
"""

from collections.abc import Sequence
from typing import Any


def before_stop(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> list[int]:
    """The longest beginning of the ids whose text ends before the first stop string; all of them if none is there."""
    text = _text(tokenizer, ids)
    found = [at for string in stop if (at := text.find(string)) >= 0]
    kept = list(ids)
    while kept and found and len(_text(tokenizer, kept)) > min(found):
        kept.pop()
    return kept


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text as the completions table has it."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
