"""Any OpenAI-compatible server: vLLM's, a hosted one, or a router before several.

"completions" sends the token ids that every other engine would see, and gets ids back where the server has them (vLLM).
"chat" sends messages and gets text: no tokenizer here. All sampling parameters are always sent: a vLLM server puts the
model's `generation_config.json` in the place of what a request leaves out. Address, key, model name and context are
checked when an engine opens."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from croco.config.models import Causal, Model
from croco.config.runtime import Server
from croco.errors import UserError
from croco.models.chat_template import end_ids
from croco.models.http_client import ANSWER_BYTES, Call, HttpClient
from croco.models.model_files import generation_config, load_config
from croco.models.protocols import Completion, Decoding, Request
from croco.models.stop_strings import Stops, ends_of, finished

OPENING_RETRIES = 2  # a wrong address should not take minutes to be found out
SHOWN_NAMES = 10  # of what a server serves, in an error
TOKEN_CHARACTERS = 1024  # more than the longest token of any vocabulary has
REPEATED = "the completion repeats the key that the server was sent"
ANSWERED_TOKEN_BYTES = 256  # of a token in an answer: its id, and its text as JSON may escape it
Count = Annotated[int, Field(ge=0, lt=2**31)]
Drawn = list[Completion | str]  # of a request; in place of a completion, the reason why there is none


class _Card(BaseModel):
    id: str
    parent: str | None = None  # of an adapter: its model, which alone says how long the context is
    max_model_len: Annotated[int, Field(gt=0)] | None = None


class _Cards(BaseModel):
    data: list[_Card]


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    index: int
    finish_reason: str
    text: str | None = None
    message: _Message | None = None
    token_ids: list[int] | None = None


class Usage(BaseModel):
    """The tokens that a request took, as the server counts them."""

    prompt_tokens: Count
    completion_tokens: Count = 0


class _Completions(BaseModel):
    choices: list[_Choice]
    usage: Usage


def sampler(server: Server, role: str, model: Causal, adapter: Path | None) -> tuple[ServerSampler, Any]:
    """A role's sampler, and the tokenizer of its model: None where the server applies the chat template."""
    key, served = "model", server
    if adapter is not None:  # .../train/ARM/adapter
        key = f"adapters.{adapter.parent.name}"
        name = server.adapters.get(adapter.parent.name)
        if name is None:
            raise UserError(
                f"runtime.servers.{role}.{key} is missing: a server cannot load {adapter}; expected the name that it "
                f"serves this adapter under"
            )
        served = server.model_copy(update={"model": name})
    if server.api == "chat":
        if model.template is not None:
            raise UserError(
                f"chat_template or chat_template_kwargs is set, which runtime.servers.{role}.api = 'chat' leaves to "
                f"the server; expected api = 'completions', or the template at the server"
            )
        return ServerSampler(Connection(served, role, model.model, key), model.model), None
    connection = Connection(served, role, model.model, key)
    from croco.models.loading import load_tokenizer

    tokenizer = load_tokenizer(model.model, model.revision, model.template, model.trust_remote_code)
    return token_sampler(connection, model, tokenizer), tokenizer


def token_sampler(connection: Connection, model: Model, tokenizer: Any) -> ServerSampler:
    """A sampler that sends and gets token ids of this model."""
    ends = end_ids(tokenizer, generation_config(model))
    vocabulary = max(len(tokenizer), load_config(model, "policy").get_text_config().vocab_size)
    return ServerSampler(connection, model.model, tokenizer, ends, vocabulary)


def served_context(
    client: HttpClient, name: str, expected: str, retries: int = OPENING_RETRIES
) -> int | None:
    """The longest context that a server says it takes, or None; raises UserError where it does not serve the name."""
    listing = Call(None, f"{client.url}/models", None, _Cards.model_validate, "the list of its models")
    cards = {card.id: card for card in client.one(listing, retries).data}
    if name not in cards:
        names = ", ".join(client.clean(other) for other in sorted(cards)[:SHOWN_NAMES]) or "nothing"
        raise UserError(f"{client.place}: {client.url} serves {names}, not '{name}'; expected {expected}")
    card = cards[name]
    return card.max_model_len or cards.get(card.parent or "", card).max_model_len


class Connection:
    """A server that serves the model asked for: what samplers and scorers have in common."""

    def __init__(
        self,
        server: Server,
        role: str,
        model: str,
        key: str = "model",
        place: str = "",
        gone: Callable[[], str | None] = lambda: None,
    ) -> None:
        """`model` is the recipe's name, `server.model` another it is served under, which the recipe has in `key`;
        `place` is what errors call the server, `gone` says why a server of ours has ended, if it has."""
        self.server, self.place = server, place or f"runtime.servers.{role}"
        self.client = HttpClient(server, self.place, gone)
        self.url, self.served = self.client.url, server.model or model
        context = served_context(self.client, self.served, f"the name it serves in {self.place}.{key}")
        self.max_context = server.max_context or context
        # the same dict that the client counts in
        self.facts = self.client.counts
        self.facts |= {"engine": "server", "url": self.url, "served_model": self.served}

    def count(self, usage: Usage) -> None:
        for name in ("prompt_tokens", "completion_tokens"):
            self.facts[name] = self.facts.get(name, 0) + getattr(usage, name)

    def known_context(self) -> int:
        if self.max_context is None:
            raise UserError(
                f"{self.place}: {self.url} does not say how long the context of '{self.served}' is; "
                f"expected it in {self.place}.max_context"
            )
        return self.max_context


class ServerSampler:
    """Samples from a server: with a tokenizer, and the end tokens to leave out of ids, by "completions"; else by
    "chat"."""

    def __init__(
        self,
        connection: Connection,
        name: str,
        tokenizer: Any = None,
        ends: Iterable[int] = (),
        vocabulary: int = 0,
    ) -> None:
        """`vocabulary` is the number of token ids that the model has."""
        self.connection, self.server, self.name = connection, connection.server, name
        self.tokenizer, self.ends, self.vocabulary = tokenizer, set(ends), vocabulary
        self.chat = self.server.api == "chat"
        self.seed: int | None = None  # of all completions, where the server draws them from one stream
        self.rows_ahead = 0  # completions to ask for at once, where not as many requests as `concurrency`
        self.temperatures = (0.0, math.inf)  # what the server takes beside 0
        self.max_context = connection.max_context or sys.maxsize if self.chat else connection.known_context()
        self.facts = connection.facts
        self.facts |= {"api": self.server.api, "dialect": self.server.dialect}

    def sample(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[tuple[int, Drawn]]:
        """Yield (key, completions) as requests finish; a prompt that the server finds too long gets its reason."""
        if decoding.top_k and self.server.dialect == "openai":
            raise UserError(
                f"top_k = {decoding.top_k}, which {self.connection.place}.dialect = 'openai' cannot ask for; "
                f"expected 0, or the dialect 'vllm'"
            )
        low, high = self.temperatures
        if decoding.temperature and not low <= decoding.temperature <= high:
            raise UserError(f"temperature {decoding.temperature}: vLLM takes 0 and {low} to {high}")
        asked = {request.key: request for request in requests if request.seeds}
        parts: dict[int, dict[int, Drawn]] = {key: {} for key in asked}
        most = max(len(request.seeds) for request in requests) if asked else 1
        at_once = max(2, self.rows_ahead // most) if self.rows_ahead else None
        answers = self.connection.client.ask(self._calls(asked.values(), decoding), at_once=at_once)
        for (key, start), answer in answers:
            parts[key][start] = answer
            if sum(map(len, parts[key].values())) == len(asked[key].seeds):
                yield key, [one for _, part in sorted(parts.pop(key).items()) for one in part]

    def _calls(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Call[Drawn]]:
        url = f"{self.connection.url}/{'chat/completions' if self.chat else 'completions'}"
        for request in requests:
            # greedy completions are one by one: vLLM refuses n > 1 at temperature 0
            most = self.server.completions_per_request or len(request.seeds) if decoding.temperature else 1
            for start in range(0, len(request.seeds), most):
                seeds = request.seeds[start : start + most]
                yield Call(
                    (request.key, start),
                    url,
                    self._body(request, seeds, decoding),
                    partial(self._read, self._drawn_from(seeds), decoding),
                    request.name,
                    partial(_too_long, len(seeds)),
                    ANSWER_BYTES + len(seeds) * decoding.max_new_tokens * ANSWERED_TOKEN_BYTES,
                )

    def _drawn_from(self, seeds: list[int]) -> list[int]:
        """The seeds to write down: vLLM makes those of the others from the first one's."""
        if self.seed is not None:
            return [self.seed] * len(seeds)
        followed = self.server.seeds and self.server.dialect == "vllm"
        return [seeds[0] + number for number in range(len(seeds))] if followed else seeds

    def _body(self, request: Request, seeds: Sequence[int], decoding: Decoding) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.connection.served,
            "n": len(seeds),
            "max_tokens": min(decoding.max_new_tokens, self.max_context - len(request.prompt_ids)),
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
        }
        body |= {"messages": list(request.messages)} if self.chat else {"prompt": request.prompt_ids}
        if decoding.stop:
            body["stop"] = list(decoding.stop)
        if self.server.dialect == "vllm":
            body |= {
                "top_k": decoding.top_k,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "return_token_ids": True,
                # the config may lack some
                "stop_token_ids": sorted(self.ends | ends_of(self.tokenizer, decoding.stop)),
            }
        if self.server.seeds:  # 31 bits are what every server takes
            body["seed"] = seeds[0] if self.server.dialect == "vllm" else seeds[0] % 2**31
        return body

    def _read(self, seeds: Sequence[int], decoding: Decoding, content: Any) -> Drawn:
        answer = _Completions.model_validate(content)
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        if [choice.index for choice in choices] != list(range(len(seeds))):
            raise ValueError(f"{len(choices)} choices, expected {len(seeds)}")
        read = [
            self._sampled(one, seed, answer.usage, len(seeds), decoding.stop)
            for one, seed in zip(choices, seeds, strict=True)
        ]
        self.connection.count(answer.usage)
        return read

    def _sampled(
        self, choice: _Choice, seed: int, usage: Usage, of: int, stop: tuple[str, ...]
    ) -> Completion | str:
        reason, client = choice.finish_reason, self.connection.client
        if reason in ("abort", "error"):
            raise ValueError(f"a completion that ended with {reason!r}")
        if reason not in ("stop", "length"):
            return f"the server ended the completion with {client.clean(reason)!r}"
        if choice.message is not None and choice.message.refusal:
            return f"the model refused: {client.clean(choice.message.refusal)!r}"
        text = choice.text if choice.message is None else choice.message.content or ""
        if text is None:
            raise ValueError("a choice without text")
        ids = choice.token_ids
        if ids is None and of > 1:
            raise UserError(
                f"{self.connection.place}: {self.connection.url} does not count the tokens of each of {of} "
                f"completions; expected {self.connection.place}.completions_per_request = 1"
            )
        counted = usage.completion_tokens if ids is None else len(ids)
        if counted == 0 and reason == "length":
            return "the prompt leaves no room for a completion"
        if any("\ud800" <= character <= "\udfff" for character in text):
            return "the completion holds half of a surrogate pair, which is no text"
        if len(text) > TOKEN_CHARACTERS * (counted + 1):
            return f"the server counts {counted} tokens in {len(text):,} characters"
        if self.tokenizer is None or ids is None:
            if client.repeats_key(text):
                return REPEATED
            return Completion([], reason, seed, text, counted, usage.prompt_tokens)
        if unknown := [token for token in ids if not 0 <= token < self.vocabulary]:
            return f"the server gave the token {unknown[0]}, the vocabulary has {self.vocabulary} tokens"
        if client.repeats_key(text) or client.repeats_key(self.tokenizer.decode(ids)):
            return REPEATED
        if reason == "stop" and (self.ends | ends_of(self.tokenizer, stop)).intersection(ids[-1:]):
            return Completion(ids[:-1], reason, seed)
        return finished(ids, reason, seed, Stops(self.tokenizer, stop) if stop else None)


def _too_long(count: int, message: str) -> Drawn | None:
    """The reason why a prompt has no completions, where it is the prompt's length."""
    known = "maximum context length" in message  # OpenAI's words, which others repeat
    return [f"the server refuses the prompt: {message}"] * count if known else None
