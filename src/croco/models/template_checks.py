"""Whether a chat template and a tokenizer keep the promise that the ids sampled are the ids scored and trained on.

Tried on real prompts with completions that templates and tokenizers stumble over; what breaks the promise is an error.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from croco.errors import UserError
from croco.models import chat_template

# plain, with white space that templates strip and tokenizers merge, and empty
COMPLETIONS = ("Ja.", " a space first", "\na line break first", "line breaks last\n\n", "", "7 × 8 = 56")

Prompt = Mapping[str, Any]  # a row of the prompts table


def examine_policy(
    tokenizer: Any, ends: set[int], prompts: Sequence[Prompt], instructions: Mapping[str, str]
) -> Iterator[str]:
    """Lines about a policy's template; raises UserError at a prompt that is no prefix or begins with two BOS."""
    chat_template.check_markup(tokenizer, [row["messages"] for row in prompts])
    longest = merged = unclosed = 0
    for row in prompts:
        with _named(row):
            # the instruction is part of what the policy reads, so it is in the conversation too
            turns = chat_template.with_instruction(row["messages"], instructions.get(row["language"]))
            ids = chat_template.prompt_ids(tokenizer, turns)
            _one_bos(tokenizer, ids)
            conversations = chat_template.conversations_ids(tokenizer, turns, COMPLETIONS)
            for whole in conversations:
                if whole[: len(ids)] != ids:
                    if not tokenizer.decode(whole).startswith(tokenizer.decode(ids)):
                        chat_template.check_prefix(tokenizer, ids, whole)
                    merged += 1
            longest = max(longest, len(ids))
            unclosed += not ends & set(conversations[0][len(ids) :])
    yield f"  chat template: {len(prompts)} prompts of at most {longest} tokens, each a prefix of prompt + completion"
    if merged:
        yield (
            f"  {merged} of {len(prompts) * len(COMPLETIONS)} completions would merge with the prompt's last token if "
            f"both were tokenised as one text; they never are"
        )
    if unclosed:
        yield (
            f"  the template closes no assistant turn with an end token (of {sorted(ends)}): completions may run to "
            f"sampling.max_new_tokens; name the string that ends them in sampling.stop"
        )
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("x")["input_ids"][0] == bos != ids[0]:
        yield f"  the tokenizer puts {tokenizer.bos_token!r} before a text, the chat template does not"


def examine_reward(tokenizer: Any, prompts: Sequence[Prompt], max_tokens: int) -> Iterator[str]:
    """Lines about a reward model's template; raises UserError where it hides a completion or doubles the BOS."""
    longest = 0
    for row in prompts:
        with _named(row):
            conversations = chat_template.conversations_ids(tokenizer, row["messages"], COMPLETIONS)
            _one_bos(tokenizer, conversations[0])
            if conversations[0] == conversations[-1]:
                raise UserError(
                    f"{tokenizer.name_or_path}: the chat template shows two completions as the same conversation, "
                    f"expected each to be in it: {tokenizer.decode(conversations[0])!r}"
                )
            longest = max(longest, *map(len, conversations))
    yield f"  chat template: {len(prompts)} conversations of at most {longest} tokens (at most {max_tokens} are scored)"


def _one_bos(tokenizer: Any, ids: Sequence[int]) -> None:
    bos = tokenizer.bos_token_id
    if bos is not None and list(ids[:2]) == [bos, bos]:
        raise UserError(
            f"{tokenizer.name_or_path}: found two {tokenizer.bos_token!r} at the beginning, expected one: the chat "
            f"template writes it twice"
        )


@contextmanager
def _named(row: Prompt) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"prompt {row['prompt_id']!r} in {row['language']}: {error}") from error
