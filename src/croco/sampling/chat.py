"""The one place where a chat template is applied, so that the ids sampled are the ids scored and trained on.

Two views of a conversation. The policy sees its own template, the language's instruction (if the recipe has one)
appended to the last user turn, and the opening of the assistant's turn; training reads exactly that prompt again. The
reward model sees the conversation as the user wrote it, without the instruction, through *its* template: it judges the
completion, not how it was asked for.

Leaves out tools and documents: the tables keep messages as text.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from croco.engines.base import Request
from croco.errors import Refused, UserError

Messages = Sequence[Mapping[str, str]]


def with_instruction(messages: Messages, instruction: str | None) -> list[dict[str, str]]:
    """A copy of the messages with the instruction appended to the last user turn after a blank line."""
    copied = [{"role": message["role"], "content": message["content"]} for message in messages]
    if not instruction:
        return copied
    for message in reversed(copied):
        if message["role"] == "user":
            message["content"] = f"{message['content']}\n\n{instruction}"
            return copied
    raise UserError(
        f"the instruction {instruction!r} needs a user turn to stand in, found {_roles(messages)}"
    )


def prompt_ids(tokenizer: Any, messages: Messages, instruction: str | None = None) -> list[int]:
    """Token ids of a policy's prompt, the assistant's turn opened; special tokens come from the template only (no
    double BOS). Raises UserError when the template is missing or refuses the messages."""
    text = _render(tokenizer, with_instruction(messages, instruction), add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def request(
    tokenizer: Any,
    key: int,
    messages: Messages,
    seeds: list[int],
    instruction: str | None = None,
    name: str = "",
) -> Request:
    """What a sampler is asked: the prompt in tokens, or in messages where the sampler has no tokenizer here."""
    if tokenizer is None:
        return Request(key, [], seeds, tuple(with_instruction(messages, instruction)), name)
    return Request(key, prompt_ids(tokenizer, messages, instruction), seeds, (), name)


def conversation_ids(tokenizer: Any, messages: Messages, completion: str) -> list[int]:
    """Token ids of the whole conversation, the completion as its last assistant turn: what a reward model reads."""
    return conversations_ids(tokenizer, messages, [completion])[0]


def conversations_ids(tokenizer: Any, messages: Messages, completions: Sequence[str]) -> list[list[int]]:
    """`conversation_ids` of many completions of one prompt."""
    turns = with_instruction(messages, None)
    texts = [
        _render(tokenizer, [*turns, {"role": "assistant", "content": text}], False) for text in completions
    ]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def same_ids(one: Any, other: Any) -> bool:
    """Whether two tokenizers cut every text into the same ids: the same words, and the same rules to find them."""
    if one.get_vocab() != other.get_vocab():
        return False
    backends: list[Any] = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (one, other)]
    if None in backends:
        return type(one) is type(other) and backends == [None, None]
    rules = [json.loads(backend.to_str()) for backend in backends]
    return all(rules[0][key] == rules[1][key] for key in ("normalizer", "pre_tokenizer", "model"))


def end_ids(tokenizer: Any, generation_config: Any) -> set[int]:
    """The ids that end a completion: the generation config's end tokens and the tokenizer's. UserError without any."""
    configured = getattr(generation_config, "eos_token_id", None)
    named = [*configured] if isinstance(configured, list | tuple) else [configured]
    found = {int(token) for token in (*named, tokenizer.eos_token_id) if token is not None}
    if not found:
        raise UserError(
            f"{_name(tokenizer)}: found no end-of-sequence token, expected one in tokenizer or generation config"
        )
    return found


def end_id(tokenizer: Any, generation_config: Any) -> int:
    """The one end token that closes an assistant turn in training: the template's own, else the tokenizer's.

    Sampling stops at any of `end_ids`; a model may list several (Qwen3 lists <|im_end|> and <|endoftext|>), and the
    tables do not say which one was drawn, so training and likelihood agree on this one.
    """
    ends = end_ids(tokenizer, generation_config)
    rendered = conversation_ids(tokenizer, [{"role": "user", "content": "x"}], "x")
    closing = next((token for token in reversed(rendered) if token in ends), None)
    if closing is not None:
        return closing
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(ends)


def check_prefix(tokenizer: Any, prompt: Sequence[int], conversation: Sequence[int]) -> None:
    """Raise UserError, showing both, unless the prompt's ids are a prefix of the conversation's ids."""
    if list(conversation[: len(prompt)]) == list(prompt):
        return
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, conversation, strict=False)) if a != b), len(conversation)
    )
    raise UserError(
        f"{_name(tokenizer)}: the chat template's prompt is no prefix of prompt + completion from token {same} on: "
        f"prompt {tokenizer.decode(list(prompt))!r}, conversation {tokenizer.decode(list(conversation))!r}"
    )


def _render(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    if not messages:
        raise UserError(f"{_name(tokenizer)}: found a conversation without messages, expected at least one")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{_name(tokenizer)}: found no chat template, expected one in the tokenizer or in the recipe"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except (TemplateError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if (
            type(error) is TemplateError
        ):  # a template's raise_exception; everything else is a fault of the template
            raise Refused(f"refused by the chat template: {reason} (roles {_roles(messages)})") from error
        raise UserError(
            f"{_name(tokenizer)}: the chat template refuses the conversation ({reason}); roles {_roles(messages)}"
        ) from error
    return text


def _roles(messages: Messages) -> str:
    return ", ".join(message["role"] for message in messages) or "none"


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
