"""Pairs as token ids: a prompt, and its completions, each with the end token where it ended by itself.

The ids that were sampled are trained on; text goes through the chat template where a pair has no ids, or ids that do
not spell it in this tokenizer. Prompts go through the template as in sampling. A completion cut at its limit gets no
end token: the policy did not end there and must not learn to. A pair that is too long is left out with its reason, or
cut and counted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import polars as pl
from transformers import PreTrainedTokenizerBase

from croco.errors import Refused, UserError
from croco.models import chat_template
from croco.storage.schemas import UnknownFinishReason, finish_reason, ledger


@dataclass(frozen=True)
class Example:
    """One prompt and its completions, chosen first; `cut_tokens` were cut from the completions' ends.

    Where more than the completion is learnt, `prompt` is the first token alone, and `learnt` says which tokens of the
    rest are; None is all.
    """

    prompt_id: str
    language: str
    prompt: list[int]
    completions: tuple[list[int], ...]
    cut_tokens: int = 0
    learnt: tuple[bool, ...] | None = None

    @property
    def num_learnt(self) -> int:
        """Tokens of the chosen completion that enter the loss."""
        return len(self.completions[0]) if self.learnt is None else sum(self.learnt)

    @property
    def num_tokens(self) -> int:
        """Tokens of a shared row: the prompt once, and each completion but its last token, which is only predicted."""
        return len(self.prompt) + sum(len(completion) - 1 for completion in self.completions)


def encode_pairs(
    pairs: pl.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    *,
    end: int,
    max_tokens: int,
    context: int | None = None,
    num_ids: int | None = None,
    over_length: str = "drop",
    chosen_only: bool = False,
    sft_on: str = "completion",
    instructions: Mapping[str, str] | None = None,
) -> tuple[list[Example], pl.DataFrame]:
    """The pairs as examples, in their order, and the ones left out (columns of the ledger) with the reason.

    `end` closes a completion, unless its `chosen_finish_reason` (`rejected_…`) is not "stop". `num_ids` is how many ids
    the policy has. `max_tokens` and `context` (the policy's, if known) bound the prompt with its longer completion, the
    end included: a longer pair is left out, or with `over_length` "truncate" its completions lose their ends.
    `chosen_only` leaves the rejected completion out, and then `sft_on` says what is learnt; `instructions` are by
    language. Raises `UserError` for a missing column, messages that the template refuses, and a template whose prompt
    is no prefix of the conversation (tried once for each order of roles)."""
    sides = ("chosen",) if chosen_only else ("chosen", "rejected")
    for column in ("prompt_id", "language", "messages", *sides):
        if column not in pairs.columns:
            raise UserError(f"the pairs have no column {column!r}: found {', '.join(pairs.columns)}")
    chat_template.check_markup(tokenizer, pairs["messages"].to_list())
    examples, dropped = [], []
    limit, most = f"max_tokens {max_tokens}", max_tokens
    if context is not None and context < max_tokens:
        limit, most = f"the policy's context of {context}", context
    tried: set[tuple[str, ...]] = set()
    for row in pairs.iter_rows(named=True):
        key = ("pair", row["prompt_id"], row["language"], row.get("chosen_sample_id"))
        try:
            messages, prompt = _prompt(tokenizer, row, (instructions or {}).get(row["language"]), tried)
            learnt = sft_on if chosen_only else "completion"
            earlier = _assistant_turns(tokenizer, messages, prompt, end) if learnt == "assistant" else None
        except Refused as error:
            dropped.append((*key, str(error)))
            continue
        known = num_ids or len(tokenizer)
        closed = [_completion_ids(tokenizer, row, side, messages, end, known) for side in sides]
        room = max(0, most - len(prompt)) if over_length == "truncate" else None
        completions = tuple(ids[:room] for ids in closed)
        if (highest := max([*prompt, *(token for ids in completions for token in ids)], default=0)) >= known:
            raise UserError(
                f"{_named(row)} has the token {highest}, and the policy has embeddings for {known} tokens only, "
                f"expected the tokenizer and template that it was trained with"
            )
        empty = any(ids in ([], [end]) for ids in closed)
        if reason := "a completion is empty" if empty else _unfit(prompt, completions, most, limit):
            dropped.append((*key, reason))
        else:
            cut_tokens = sum(map(len, closed)) - sum(map(len, completions))
            one = Example(row["prompt_id"], row["language"], prompt, completions, cut_tokens)
            examples.append(one if learnt == "completion" else _with_earlier_turns(one, earlier))
    return examples, pl.DataFrame(pl.from_arrow(ledger(dropped)))


def _prompt(
    tokenizer: PreTrainedTokenizerBase,
    row: Mapping[str, Any],
    instruction: str | None,
    tried: set[tuple[str, ...]],
) -> tuple[chat_template.Messages, list[int]]:
    """The prompt and its ids; a template that has not been tried on this order of roles must continue them."""
    try:
        messages = chat_template.with_instruction(row["messages"], instruction)
        ids = chat_template.prompt_ids(tokenizer, messages)
        roles = tuple(message["role"] for message in messages)
        if roles not in tried:
            tried.add(roles)
            whole = chat_template.conversation_ids(tokenizer, messages, "Ja.")
            # In text at least: ids may merge where prompt and completion are tokenised as one, which we never do.
            if not tokenizer.decode(whole).startswith(tokenizer.decode(ids)):
                chat_template.check_prefix(tokenizer, ids, whole)
    except Refused:
        raise
    except UserError as error:
        raise UserError(f"{_named(row)}: {error}") from error
    return messages, ids


def _assistant_turns(
    tokenizer: PreTrainedTokenizerBase, messages: chat_template.Messages, prompt: Sequence[int], end: int
) -> list[bool]:
    """Which of the prompt's tokens an assistant's turn holds, its end token included."""
    held = [False] * len(prompt)
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number == 0:
            continue
        opened = chat_template.prompt_ids(tokenizer, messages[:number])
        same = (a == b for a, b in zip(opened, prompt, strict=False))
        start = next((place for place, equal in enumerate(same) if not equal), min(len(opened), len(prompt)))
        stop = prompt.index(end, start) + 1 if end in prompt[start:] else start
        text = message["content"].rpartition("</think>")[2].strip()  # templates leave earlier thoughts out
        if text not in tokenizer.decode(prompt[start:stop], clean_up_tokenization_spaces=False):
            raise Refused(
                "the chat template does not show where an earlier turn of the assistant begins and ends"
            )
        held[start:stop] = [True] * (stop - start)
    return held


def _with_earlier_turns(example: Example, earlier: list[bool] | None) -> Example:
    """All of the conversation behind its first token as one completion: learnt whole, or where `earlier` says."""
    (completion,) = example.completions
    rest = (example.prompt[1:] + completion,)
    learnt = None if earlier is None else (*earlier[1:], *(True for _ in completion))
    return replace(example, prompt=example.prompt[:1], completions=rest, learnt=learnt)


def _named(row: Mapping[str, Any]) -> str:
    """How an error names a pair: by file and row where it is from one."""
    return row.get("where") or f"prompt {row['prompt_id']!r} in {row['language']}"


def _completion_ids(
    tokenizer: PreTrainedTokenizerBase,
    row: Mapping[str, Any],
    side: str,
    messages: chat_template.Messages,
    end: int,
    num_ids: int,
) -> list[int]:
    """The side's ids, if they spell its text in this tokenizer (a file may hold another policy's), else the text's."""
    ids = row.get(f"{side}_ids")
    if ids is not None:
        if foreign := [token for token in ids if not 0 <= token < num_ids]:
            raise UserError(
                f"{_named(row)}: {side}_ids holds {foreign[0]}, and the policy has the ids 0 to "
                f"{num_ids - 1}: they are another policy's, remove the column"
            )
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ids = ids if text == row[side] else None
    if ids is None:
        ids = chat_template.completions_ids(tokenizer, messages, [row[side]])[0]
    try:
        ended = finish_reason(row.get(f"{side}_finish_reason") or "stop") == "stop"
    except UnknownFinishReason as error:
        raise UserError(f"{_named(row)}: {error}") from None
    return [*ids, end] if ended else list(ids)


def _unfit(prompt: Sequence[int], completions: Sequence[list[int]], most: int, limit: str) -> str | None:
    if not prompt:
        return "the prompt has no tokens"
    longest = len(prompt) + max(map(len, completions))
    if longest > most:
        return f"prompt and completion are more than {limit}: {longest} tokens"
    if not all(completions):
        return f"the prompt leaves none of {limit} for a completion: it has {len(prompt)} tokens"
    if len(completions) == 2 and completions[0] == completions[1]:
        return "chosen and rejected are the same tokens"
    return None


def held_out(prompt_id: str, fraction: float) -> bool:
    """Whether a prompt is in the validation part: by a digest of its id, so the same in every arm and language."""
    digest = int.from_bytes(blake2b(prompt_id.encode(), digest_size=8, person=b"croco-valid").digest(), "big")
    return digest < fraction * 2**64
