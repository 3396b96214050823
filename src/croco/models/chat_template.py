"""The one place where a chat template is applied, so that the ids sampled are the ids scored and trained on.

The policy sees its own template, the language's instruction in the last user turn, and the opening of the assistant's
turn; training reads exactly that prompt again. The reward model sees the conversation as the user wrote it, through
*its* template. Special tokens come from the template only: a token's name in a message is text, and is tokenised as
text. Leaves out tools and documents."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError

from croco.errors import Refused, UserError, one_line, printable
from croco.models.protocols import Request
from croco.models.sandbox import render

Messages = Sequence[Mapping[str, str]]
LOOKED_FOR = (
    r"""(['"])NAME\1\s+(not\s+)?in\b|\.(r?split|r?partition|startswith|endswith|replace)\(\s*['"]NAME"""
)
PROBE = "qzjx"  # a completion that no template writes by itself
MARK = "\ufdd0"  # breaks the name of a special token in two; Unicode keeps it for such use, no text has it


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
        f"the instruction {instruction!r} is for a user turn, expected one, found {_roles(messages)}"
    )


def prompt_ids(tokenizer: Any, messages: Messages, instruction: str | None = None) -> list[int]:
    """Token ids of a policy's prompt, the assistant's turn opened. Raises UserError when the template is missing or
    refuses the messages."""
    turns = with_instruction(messages, instruction)
    return _encoded(tokenizer, _render(tokenizer, [turns], opened=True))[0]


def text_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of completions alone, as a policy would write them, without special tokens."""
    return _encoded(tokenizer, [_broken(tokenizer, text) for text in texts])


def completions_ids(tokenizer: Any, messages: Messages, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of completions that are known as text, without the end of the turn.

    They are what the template makes of them behind the prompt: an empty block of thoughts may be added (Qwen3), a space
    (Mistral) or white space stripped (Gemma, Llama 3). A text that the template leaves as it is, refuses, or writes
    behind another prompt is tokenised alone."""
    closing = _closing(
        tokenizer, tuple(message["role"] for message in messages), str(tokenizer.chat_template)
    )
    if closing is None:
        return text_ids(tokenizer, texts)
    turns = with_instruction(messages, None)
    conversations = [[*turns, {"role": "assistant", "content": text}] for text in texts]
    try:
        (prompt,) = _render(tokenizer, [turns], opened=True)
        wholes = _render(tokenizer, conversations, opened=False)
    except Refused:
        return text_ids(tokenizer, texts)
    ids = []
    for text, whole in zip(texts, wholes, strict=True):
        written = whole.removeprefix(prompt).removesuffix(closing)
        as_it_is = written == _broken(tokenizer, text) or not whole.startswith(prompt)
        ids += text_ids(tokenizer, [text]) if as_it_is else _encoded(tokenizer, [MARK + written])
    return ids


@lru_cache(maxsize=64)
def _closing(tokenizer: Any, roles: tuple[str, ...], template: str) -> str | None:
    """What the template writes behind a completion to such a prompt; None where that cannot be told."""
    turns = [{"role": role, "content": "x"} for role in roles]
    try:
        (prompt,) = _render(tokenizer, [turns], opened=True)
        (whole,) = _render(tokenizer, [[*turns, {"role": "assistant", "content": PROBE}]], opened=False)
    except UserError:
        return None
    _, content, closing = whole.removeprefix(prompt).rpartition(PROBE)
    return closing if content and whole.startswith(prompt) else None


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
    conversations = [[*turns, {"role": "assistant", "content": text}] for text in completions]
    return _encoded(tokenizer, _render(tokenizer, conversations, opened=False))


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
    """The ids that end a completion: the generation config's end tokens and the tokenizer's, and where the template
    closes a turn with none of them (Qwen 2.5's base), the special token that it does it with. UserError without any."""
    configured = getattr(generation_config, "eos_token_id", None)
    named = [*configured] if isinstance(configured, list | tuple) else [configured]
    if wrong := [token for token in named if token is not None and not isinstance(token, int)]:
        raise UserError(
            f"{_name(tokenizer)}: its generation config has the end token {wrong[0]!r}, expected an id"
        )
    ends = {token for token in (*named, tokenizer.eos_token_id) if token is not None}
    if not ends.intersection(closing := _end_of_turn(tokenizer, str(tokenizer.chat_template))):
        ends.update([token for token in closing if token in special_ids(tokenizer).values()][:1])
    if not ends:
        raise UserError(
            f"{_name(tokenizer)}: found no end-of-sequence token, expected one in tokenizer or generation config"
        )
    return ends


def end_id(tokenizer: Any, generation_config: Any) -> int:
    """The end token that closes an assistant turn in training: the template's own, else the tokenizer's. Sampling stops
    at any of `end_ids` (Qwen3 has two), and the tables do not say which, so training and likelihood agree on this one.
    """
    ends = end_ids(tokenizer, generation_config)
    closing = (token for token in _end_of_turn(tokenizer, str(tokenizer.chat_template)) if token in ends)
    return next(closing, tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(ends))


@lru_cache(maxsize=16)
def _end_of_turn(tokenizer: Any, template: str) -> tuple[int, ...]:
    """What the template writes behind a completion, as ids; none where that cannot be told."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PROBE}]
    try:
        (whole,) = _render(tokenizer, [turns], opened=False)
    except UserError:
        return ()
    _, written, closing = whole.rpartition(PROBE)
    return tuple(_encoded(tokenizer, [closing])[0]) if written else ()


@lru_cache(maxsize=16)
def special_ids(tokenizer: Any) -> dict[str, int]:
    """Special tokens, which the text of a completion never shows, by name."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def check_markup(tokenizer: Any, conversations: Sequence[Messages]) -> None:
    """Raise UserError when most conversations have a turn that begins with a special token: another tool has put a chat
    template around their texts already."""
    names = _special_names(tokenizer, str(tokenizer.chat_template))
    marked = [
        message["content"]
        for messages in conversations
        for message in messages
        if names is not None and names.match(message["content"].lstrip())
    ]
    if len(marked) > len(conversations) / 2:
        raise UserError(
            f"{len(marked)} of {len(conversations)} prompts carry the model's chat markup already, as in "
            f"{marked[0][:80]!r}; expected the text alone: the chat template adds special tokens, and twice is wrong"
        )


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


def _render(tokenizer: Any, conversations: Sequence[list[dict[str, str]]], opened: bool) -> list[str]:
    """Each conversation as the template writes it, special tokens in its texts broken, the assistant's turn `opened` or
    not."""
    if not all(conversations):
        raise UserError(f"{_name(tokenizer)}: found a conversation without messages, expected at least one")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{_name(tokenizer)}: found no chat template, expected one in the tokenizer or in the recipe"
        )
    turns = [
        [turn | {"content": _broken(tokenizer, turn["content"])} for turn in messages]
        for messages in conversations
    ]
    try:
        return _apply(tokenizer, turns, opened)
    except Exception as error:  # a template is a program: it may raise anything
        reason = printable(one_line(error, 300))
        if type(error) is TemplateError:  # raise_exception; everything else is a fault of the template
            roles = _roles(conversations[0])
            raise Refused(f"refused by the chat template: {reason} (roles {roles})") from error
        raise UserError(
            f"{_name(tokenizer)}: the chat template refuses the conversation ({reason}); "
            f"roles {_roles(conversations[0])}"
        ) from error


def _apply(tokenizer: Any, conversations: Sequence[list[dict[str, str]]], opened: bool) -> list[str]:
    if type(tokenizer).apply_chat_template.__module__ != "transformers.tokenization_utils_base":
        options = {"add_generation_prompt": opened, "tokenize": False}  # a way of its own: Mistral's
        return [tokenizer.apply_chat_template(messages, **options) for messages in conversations]
    return render(tokenizer.get_chat_template(), conversations, opened, tokenizer.special_tokens_map)


def _broken(tokenizer: Any, text: Any) -> Any:
    """A text with a mark within the name of every special token that it holds; some templates want it in parts."""
    if not isinstance(text, str):
        return [part | {"text": _broken(tokenizer, part["text"])} for part in text]
    text = text.replace(MARK, "")
    names = _special_names(tokenizer, str(tokenizer.chat_template))
    while names is not None and names.search(text):
        text = names.sub(lambda name: name[0][0] + MARK + name[0][1:], text)
    return text


@lru_cache(maxsize=16)
def _special_names(tokenizer: Any, template: str) -> re.Pattern[str] | None:
    """What matches the names of special tokens, and of other added tokens around a user's turn; but for those that the
    template itself looks for in a message, as Qwen's does for </think>."""
    try:
        (turn,) = _apply(tokenizer, [[{"role": "user", "content": "x"}]], False)
    except Exception:  # noqa: BLE001 (it is said when a prompt meets it)
        turn = ""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special or token.content in turn}
    names = {name for name in names if not re.search(LOOKED_FOR.replace("NAME", re.escape(name)), template)}
    parts = [re.escape(name) for name in names if len(name) > 1 and not name.isspace()]
    return re.compile("|".join(sorted(parts, key=len, reverse=True))) if parts else None


def _encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts; what is on either side of a mark is tokenised by itself."""
    plain = [text.split(MARK)[0] for text in texts]
    encoded: list[list[int]] = tokenizer(plain, add_special_tokens=False)["input_ids"] if texts else []
    for ids, text in zip(encoded, texts, strict=True):
        for part in text.split(MARK)[1:]:
            ids += _continuing(tokenizer, part)
    return encoded


def _continuing(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that continues another: behind a line break, SentencePiece puts no space before it."""
    both = tokenizer(["\n", "\n" + text, text], add_special_tokens=False)["input_ids"]
    line_break, behind, alone = both
    return behind[len(line_break) :] if behind[: len(line_break)] == line_break else alone


def _roles(messages: Messages) -> str:
    return ", ".join(message["role"] for message in messages) or "none"


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
