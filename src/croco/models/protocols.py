"""What an engine promises: requests in, completions or scores out, in tokens. Imports no engine and no torch.

An engine may batch and reorder: a request is known by its key, a completion by its seed. A prompt that fills the
context the caller keeps out by `max_context`, and counts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = dict[str, Any]  # role and content: text, or the parts a chat template takes


@dataclass(frozen=True)
class Decoding:
    """How to sample. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch the truncations off; `stop` are strings
    that end a completion and are left out of it."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One prompt in tokens and one continuation wanted per seed (each in [0, 2**63)). Engines that apply the chat
    template themselves get `messages` and no ids. `name` is what an error calls the prompt."""

    key: int
    prompt_ids: list[int]
    seeds: list[int]
    messages: tuple[Message, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Completion:
    """One completion: its ids without end token or stop string, why it ended ("stop" or "length"), and its seed, or the
    engine's. `num_tokens` were drawn, where that is not the ids and an end token. An engine that answers in text gives
    `text`, the numbers of tokens it counted, and no ids."""

    ids: list[int]
    finish_reason: str
    seed: int
    text: str | None = None
    num_tokens: int | None = None
    num_prompt_tokens: int | None = None

    @property
    def completion_tokens(self) -> int:
        """Tokens it took, the end token counted."""
        return len(self.ids) + (self.finish_reason == "stop") if self.num_tokens is None else self.num_tokens


@dataclass(frozen=True)
class ScoreRequest:
    """Token sequences that share a prefix: sequence i is `prompt_ids + completions[i]`, each completion non-empty."""

    key: int
    prompt_ids: list[int]
    completions: list[list[int]]


class Sampler(Protocol):
    """Draws completions."""

    name: str
    max_context: int  # tokens of prompt and completion together
    facts: dict[str, Any]  # for `stage.json`: engine, device, own seed; a server's counts grow as it is used

    def sample(
        self, requests: Sequence[Request], decoding: Decoding
    ) -> Iterator[tuple[int, Sequence[Completion | str]]]:
        """Yield (key, completions in the order of the seeds) once per request, as requests finish; in place of a
        completion that there cannot be, the reason why. A completion ends with "length" at `max_new_tokens` or at the
        end of the context. Raises UserError on a prompt that leaves no room for a single token."""
        ...


class Scorer(Protocol):
    """Gives each sequence one number."""

    name: str
    max_context: int
    facts: dict[str, Any]

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        """Scores in the order of the requests and their completions; one that is not finite is the caller's to name."""
        ...


@dataclass(frozen=True)
class JudgeRequest:
    """A conversation that asks for a verdict."""

    key: int
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Judged:
    """What a judge wrote, why it ended ("stop" or "length"), and the tokens it took; parsing is the caller's."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class Judge(Protocol):
    """Answers conversations greedily."""

    name: str
    facts: dict[str, Any]

    def judge(
        self, requests: Sequence[JudgeRequest], max_new_tokens: int
    ) -> Iterator[tuple[int, Judged | str]]:
        """Yield (key, what the judge wrote) once per request; in its place the reason why there is nothing."""
        ...
