"""Pairs as token ids: one prompt, and its completions each closed by the end-of-sequence token.

The ids that were sampled are the ids trained on; text is tokenised only where a pair brings no ids. Prompts
go through the same chat template as in sampling. Nothing is cut: a pair that is too long is left out, with
its reason. Left out: choosing pairs (`pairing/`) and laying them out in rows (`batches.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import polars as pl
from transformers import PreTrainedTokenizerBase

from croco.errors import UserError
from croco.sampling.chat import prompt_ids

DROPPED_SCHEMA = {
    "unit": pl.String,
    "prompt_id": pl.String,
    "language": pl.String,
    "sample_id": pl.Int32,
    "reason": pl.String,
}


@dataclass(frozen=True)
class Example:
    """One prompt and its completions, chosen first; every completion ends with the end-of-sequence token."""

    prompt_id: str
    language: str
    prompt: list[int]
    completions: tuple[list[int], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens a shared row holds: the prompt once, and each completion but its last token, which is only
        predicted.
        """
        return len(self.prompt) + sum(len(completion) - 1 for completion in self.completions)


def encode_pairs(
    pairs: pl.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    *,
    end: int,
    max_tokens: int,
    chosen_only: bool = False,
    instructions: Mapping[str, str] | None = None,
) -> tuple[list[Example], pl.DataFrame]:
    """The pairs as examples, in their order, and the ones left out (columns of the ledger) with the reason.

    `end` is the id that closes a completion. `max_tokens` bounds the prompt with its longer completion.
    `chosen_only` leaves the rejected completion out (supervised tuning). `instructions` maps a language to
    the sentence appended to the last user turn, as in sampling. Raises `UserError` for a column that is
    missing, or messages that the chat template refuses.
    """
    sides = ("chosen",) if chosen_only else ("chosen", "rejected")
    for column in ("prompt_id", "language", "messages", *sides):
        if column not in pairs.columns:
            raise UserError(f"the pairs have no column {column!r}: found {', '.join(pairs.columns)}")
    examples, dropped = [], []
    for row in pairs.iter_rows(named=True):
        instruction = (instructions or {}).get(row["language"])
        prompt = prompt_ids(tokenizer, row["messages"], instruction)
        completions = tuple([*_completion_ids(tokenizer, row, side), end] for side in sides)
        if reason := _unfit(prompt, completions, max_tokens):
            dropped.append(("pair", row["prompt_id"], row["language"], row.get("chosen_sample_id"), reason))
        else:
            examples.append(Example(row["prompt_id"], row["language"], prompt, completions))
    return examples, pl.DataFrame(dropped, schema=DROPPED_SCHEMA, orient="row")


def _completion_ids(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], side: str) -> list[int]:
    ids = row.get(f"{side}_ids")
    if ids is None:
        ids = tokenizer(row[side], add_special_tokens=False)["input_ids"]
    return list(ids)


def _unfit(prompt: Sequence[int], completions: Sequence[list[int]], max_tokens: int) -> str | None:
    if not prompt:
        return "the prompt has no tokens"
    longest = len(prompt) + max(map(len, completions))
    if longest > max_tokens:
        return f"prompt and completion have {longest} tokens, more than max_tokens {max_tokens}"
    if any(len(completion) == 1 for completion in completions):
        return "a completion is empty"
    if len(completions) == 2 and completions[0] == completions[1]:
        return "chosen and rejected are the same tokens"
    return None


def held_out(prompt_id: str, fraction: float) -> bool:
    """Whether a prompt belongs to the validation part: by a digest of its id, so the same in every arm and
    language.
    """
    digest = int.from_bytes(blake2b(prompt_id.encode(), digest_size=8, person=b"croco-valid").digest(), "big")
    return digest < fraction * 2**64
