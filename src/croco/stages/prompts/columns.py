"""Which columns of a row are the prompt, the completions and the rest, in the forms that other tools write.

Those of TRL, UltraFeedback, axolotl, ms-swift, LLaMA-Factory, Alpaca and ShareGPT are told apart by their columns. What
cannot be carried (tools, pictures) raises `Unusable`, whose text is the reason in a ledger; a column that says
something else than what was read, or a value of a wrong type, raises UserError naming file, row and column. Unknown
columns and message keys are counted."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from croco.errors import UserError, notice
from croco.stages.prompts.values import Turn, Unusable, read_turns, says_something
from croco.storage.rows import kind
from croco.storage.schemas import PAIRS

# our names for columns, and other tools' names for them, tried in this order
NAMES = {
    "prompt_id": ("prompt_id", "question_id"),
    "language": ("language",),
    "sample_id": ("sample_id",),
    "system": ("system", "system_prompt"),
    "prompt": ("messages", "conversations", "prompt", "instruction", "question", "query", "input"),
    "completion": ("completion", "response", "output", "text"),
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response", "rejected_messages"),
    "score": ("score", "reward", "overall_score"),
    "finish_reason": ("finish_reason",),
    "reference": ("reference",),
    "source": ("source",),
    "domain": ("domain", "category"),
}
# those of a file of pairs or completions, which --column maps
MAPPED = [name for name in NAMES if name not in ("reference", "source", "domain")]
CONTENT = ("system", "prompt", "completion", "chosen", "rejected")
CANNOT_CARRY = ("tools", "functions", "images", "image", "videos", "video", "audios", "audio", "documents",
                "chat_template_kwargs")  # fmt: skip
NOT_A_TARGET = ("weight", "train", "training", "loss")  # of a completion's message: zero or false
# columns that other parts of a form read, or that our pairs have besides, so never counted as not read
ELSEWHERE = {
    "id", "history", "label", "kto_tag", "completions", "subset", "score_chosen", "score_rejected",
    *(f"{side}_{name}" for side in ("chosen", "rejected") for name in ("ids", "language", "finish_reason", "score")),
    *(column for name in NAMES if name not in CONTENT for column in NAMES[name]),
    *(name for name in PAIRS.schema.names if name not in ("messages", "chosen", "rejected")),
}  # fmt: skip


class FileRow:
    """One row of a file, read by our names for its columns; `columns` maps those to the file's where they differ."""

    def __init__(
        self,
        where: str,
        values: Any,
        columns: Mapping[str, str] | None = None,
        unread: Counter[str] | None = None,
        section: str = "",
    ) -> None:
        if not isinstance(values, Mapping):
            raise UserError(f"{where}: expected an object with columns, found {kind(values)}")
        self.where, self.values, self.columns = where, values, columns or {}
        self.unread = Counter[str]() if unread is None else unread
        self.read: set[str] = set()
        self.mapping = f"{section}.columns." if section else "--column "  # how a column is mapped

    def column(self, name: str) -> str | None:
        """The column that holds one of ours, or None."""
        for column in (self.columns[name],) if name in self.columns else NAMES[name]:
            if self.values.get(column) is not None:
                return column
        return None

    def is_null(self, name: str) -> bool:
        """Whether there is a column for one of ours, and nothing in it."""
        names = (self.columns[name],) if name in self.columns else NAMES[name]
        return self.column(name) is None and any(column in self.values for column in names)

    def need(self, name: str) -> Any:
        """The value of one of our columns; raises UserError where there is none."""
        column = self.column(name)
        if column is None:
            wanted = self.columns.get(name) or " or ".join(f"'{one}'" for one in NAMES[name])
            there = ", ".join(map(str, self.values)) or "none"
            raise UserError(
                f"{self.where}: no {name} in column {wanted} (found: {there}); map it with {self.mapping}{name}=NAME"
            )
        self.read.add(column)
        return self.values[column]

    def text(self, name: str) -> str:
        value = self.need(name)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise UserError(f"{self.where}: {name} is {kind(value)}, expected text or a whole number")
        return str(value)

    # Conversations ---------------------------------------------------------------------------------------------

    def turns(self, value: Any, what: str = "the prompt", role: str = "user") -> list[Turn]:
        return read_turns(self.where, value, self.unread, what, role)

    def prompt(self) -> list[Turn]:
        """The conversation in the prompt's column, the system prompt and the history before it."""
        value = self.need("prompt")
        if self.column("prompt") == "instruction" and says_something(self.values.get("input")):
            more = self.values["input"]
            if not isinstance(value, str) or not isinstance(more, str):
                raise UserError(
                    f"{self.where}: input is {kind(more)}, expected text beside an instruction in text"
                )
            self.read.add("input")
            value = f"{value}\n{more}" if value else more  # as LLaMA-Factory joins them
        return self._with_system([*self._history(), *self.turns(value)])

    def _history(self) -> list[Turn]:
        value = self.values.get("history")
        if not says_something(value):
            return []
        turns: list[Turn] = []
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, list) or [type(text) for text in one] != [str, str]:
                raise UserError(f"{self.where}: history is not a list of [user's text, assistant's text]")
            turns += [{"role": "user", "content": one[0]}, {"role": "assistant", "content": one[1]}]
        return turns

    def _with_system(self, turns: list[Turn]) -> list[Turn]:
        column = self.column("system")
        value = None if column is None else self.need("system")
        if not says_something(value):
            return turns
        if not isinstance(value, str):
            raise UserError(f"{self.where}: {column} is {kind(value)}, expected text")
        if turns and turns[0]["role"] == "system":
            if turns[0]["content"].strip() != value.strip():
                raise UserError(
                    f"{self.where}: {column} and the first message are two system prompts, expected one"
                )
            return turns
        return [{"role": "system", "content": value}, *turns]

    # Completions -----------------------------------------------------------------------------------------------

    def completion(self) -> str:
        """The completion's text, given as text or as a single turn."""
        value = self.need("completion")
        if isinstance(value, list | Mapping):
            turns = self.turns(value, "the completion", "assistant")
            self._is_target(value if isinstance(value, Mapping) else value[-1])
            value = turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "assistant" else None
        if not isinstance(value, str):
            raise UserError(
                f"{self.where}: completion is {kind(value)}, expected text or one assistant's turn"
            )
        return value

    def answered(self) -> tuple[list[Turn], str]:
        """The prompt of a row with one completion, which may be the last turn of its messages, and that completion."""
        self.can_carry()
        turns = self.prompt()
        if turns[-1]["role"] != "assistant" or "completion" in self.columns:
            completion = self.completion()
            prompt = turns[:-1] if turns[-1] == {"role": "assistant", "content": completion} else turns
        else:
            value = self.values[str(self.column("prompt"))]
            self._is_target(value[-1] if isinstance(value, list) else value)
            prompt, completion = turns[:-1], turns[-1]["content"]
        if not prompt:
            raise UserError(f"{self.where}: found no prompt before the assistant's turn")
        self.check_unread(prompt, [completion], ("prompt", "completion", "system"))
        return prompt, completion

    def is_pair(self) -> bool:
        if self.column("rejected") is None:
            return False
        return self.column("chosen") is not None or str(self.column("rejected")).startswith("rejected_")

    def sides(self) -> tuple[list[Turn], dict[str, str]]:
        """The prompt of a row with a chosen and a rejected completion, and the text of both."""
        self.can_carry()
        rejected = self.turns(self.need("rejected"), "rejected", "assistant")
        given = self.prompt() if self.column("prompt") else []
        if self.column("chosen") is not None:
            chosen = self.turns(self.need("chosen"), "chosen", "assistant")
        elif given and given[-1]["role"] == "assistant":
            given, chosen = given[:-1], given[-1:]  # ms-swift
        else:
            chosen = [{"role": "assistant", "content": self.completion()}]
        sides = {"chosen": chosen, "rejected": rejected}
        for side, turns in sides.items():
            if turns[-1]["role"] != "assistant":
                raise UserError(
                    f"{self.where}: {side} ends with the {turns[-1]['role']}'s turn, expected the assistant's"
                )
            column = self.column(side)
            if column and isinstance(self.values[column], list):
                self._is_target(self.values[column][-1])
        if given and given[-1]["role"] == "assistant" and _repeats(given, chosen):
            given = given[:-1]  # UltraFeedback binarized: the column messages is the chosen conversation
        prompts = [self._with_system(self._whole(given, turns[:-1])) for turns in sides.values()]
        if prompts[0] != prompts[1]:
            raise UserError(
                f"{self.where}: chosen and rejected differ before their last turn, expected one prompt"
            )
        if not prompts[0]:
            raise UserError(
                f"{self.where}: found no prompt, expected one before the last turns or in a column prompt"
            )
        texts = {side: turns[-1]["content"] for side, turns in sides.items()}
        self.check_unread(prompts[0], list(texts.values()), ("prompt", "system"))
        return prompts[0], texts

    def _whole(self, given: list[Turn], before: list[Turn]) -> list[Turn]:
        """The prompt, from its column and the turns before a side's last, of which one may hold only a part."""
        if not before or not given or given == before:
            return given or before
        if before[0]["role"] == "assistant":
            return [*given, *before]
        for longer, shorter in ((given, before), (before, given)):
            if longer[-len(shorter) :] == shorter or longer[: len(shorter)] == shorter:
                return longer
        if len(given) == 1 and _repeats(given, before):
            return before
        raise UserError(
            f"{self.where}: column {self.column('prompt')} and the conversations of chosen and rejected are two "
            f"prompts, expected one (the column to use can be mapped with {self.mapping}prompt=NAME)"
        )

    # What is not read ------------------------------------------------------------------------------------------

    def can_carry(self) -> None:
        """Raise Unusable for a column that belongs to the prompt and has no place in our tables."""
        for column in CANNOT_CARRY:
            if says_something(self.values.get(column)) and column not in self.columns.values():
                raise Unusable(f"the row has {column}, which a prompt cannot carry")

    def _is_target(self, turn: Any) -> None:
        if isinstance(turn, Mapping):
            for key in NOT_A_TARGET:
                if key in turn and turn[key] is not None and not turn[key]:
                    raise Unusable(
                        f"the completion's message has {key} {turn[key]}, so it is not to be learnt"
                    )

    def check_unread(self, prompt: Sequence[Turn], completions: Sequence[str], names: Sequence[str]) -> None:
        """Raise UserError for a column of the prompt or completion that was not read and says something else."""
        read = [*prompt, *({"role": "assistant", "content": text} for text in completions)]
        for name in names:
            for column in NAMES[name] if name not in self.columns else ():
                value = self.values.get(column)
                if not says_something(value) or column in self.read:
                    continue
                if self._is_repeated(column, value, read):
                    self.read.add(column)
                    continue
                raise UserError(
                    f"{self.where}: column {column} holds something else than the {name} that was read"
                    f" ({', '.join(sorted(self.read))}): remove it, or say which to use with {self.mapping}{name}=NAME"
                )
        self.count_unread()

    def _is_repeated(self, column: str, value: Any, read: Sequence[Turn]) -> bool:
        if isinstance(value, str):  # a copy of a turn; Alpaca's `text` is all of them as one text
            texts = [turn["content"].strip() for turn in read]
            return value.strip() in texts or (column == "text" and all(text in value for text in texts))
        try:
            return _repeats(self.turns(value), read)
        except (UserError, Unusable):
            return False

    def count_unread(self) -> None:
        """Count the columns that no form has a use for."""
        for name, value in self.values.items():
            if value is not None and name not in self.read and name not in ELSEWHERE:
                self.unread[str(name)] += 1


def _repeats(turns: Sequence[Turn], read: Sequence[Turn]) -> bool:
    """Whether all turns are among those that were read."""
    texts = {turn["content"].strip() for turn in read}
    return all(turn["content"].strip() in texts for turn in turns)


def warn_of_unread(title: str, unread: Mapping[str, int]) -> None:
    """Say on the terminal which columns and message keys of a file were not read."""
    if unread:
        names = ", ".join(f"{name} ({count:,})" for name, count in sorted(unread.items()))
        notice(f"{title}: not read: {names}")
