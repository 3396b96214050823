"""Any OpenAI-compatible server: vLLM's, a hosted one, or what stands in front of several.

Two ways in. "completions" sends the very token ids that every other engine would see, and gets ids back where the
server has them to give (vLLM). "chat" sends messages, lets the server apply its template, and gets text: no tokenizer
here. Sampling parameters are always sent, all of them: a vLLM server puts the model's `generation_config.json` in the
place of what a request leaves out. What can be known before is checked when an engine opens: address, key, model name,
context, and for a scorer that scores are raw logits.

Leaves out starting servers and how requests survive faults, which is `wire.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from croco.engines.base import Decoding, Request, Sampled, ScoreRequest
from croco.engines.wire import Call, Wire
from croco.errors import UserError
from croco.recipe import Model, Reward, Server
from croco.sampling.chat import end_ids

OPENING_RETRIES = 2  # a wrong address should not take minutes to be found out
SCORES_PER_REQUEST = 64


class _Card(BaseModel):
    id: str
    parent: str | None = None  # of an adapter: its model, which alone says how long the context is
    max_model_len: int | None = None


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


class _Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int = 0


class _Completions(BaseModel):
    choices: list[_Choice]
    usage: _Usage


class _Class(BaseModel):
    index: int
    probs: list[float]  # vLLM's word, also for logits


class _Classes(BaseModel):
    data: list[_Class]
    usage: _Usage


def sampler(
    server: Server, role: str, model: Model, template: Path | None, adapter: Path | None
) -> tuple[ServerSampler, Any]:
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
        if template is not None:
            raise UserError(
                f"chat_template = '{template}', which runtime.servers.{role}.api = 'chat' leaves to the server; "
                f"expected api = 'completions', or the template at the server"
            )
        return ServerSampler(Connection(served, role, model.model, key), model.model, None), None
    connection = Connection(served, role, model.model, key)
    from croco.engines.hf import generation_config, load_tokenizer

    tokenizer = load_tokenizer(model.model, model.revision, template, model.trust_remote_code)
    ends = end_ids(tokenizer, generation_config(model.model, model.revision))
    return ServerSampler(connection, model.model, ends), tokenizer


def scorer(server: Server, reward: Reward) -> tuple[ServerScorer, Any]:
    """The scorer of the role "score", and its tokenizer: conversations are sent as token ids."""
    connection = Connection(server, "score", reward.model)
    from croco.engines.hf import load_config, load_tokenizer

    tokenizer = load_tokenizer(reward.model, reward.revision, None, reward.trust_remote_code)
    pad = load_config(reward, "reward").get_text_config().pad_token_id
    probe = tokenizer("Ja.", add_special_tokens=False)["input_ids"]
    return ServerScorer(connection, reward.model, probe, pad), tokenizer


class Connection:
    """A server that serves the model asked for: what samplers and scorers have in common."""

    def __init__(self, server: Server, role: str, model: str, key: str = "model") -> None:
        """`model` is the recipe's name, `server.model` another it is served under, which the recipe has in `key`."""
        self.server, self.place = server, f"runtime.servers.{role}"
        self.wire = Wire(server, self.place)
        self.url, self.served = self.wire.url, server.model or model
        listing = Call(None, f"{self.url}/models", None, _Cards.model_validate_json, "the list of its models")
        cards = {card.id: card for card in self.wire.one(listing, OPENING_RETRIES).data}
        if self.served not in cards:
            names = ", ".join(sorted(cards)) or "nothing"
            raise UserError(
                f"{self.place}: {self.url} serves {names}, not '{self.served}'; "
                f"expected the name it serves in {self.place}.{key}"
            )
        card = cards[self.served]
        whole = cards.get(card.parent or "", card)
        self.max_context = server.max_context or card.max_model_len or whole.max_model_len
        # the counts stay the wire's own, so that they grow
        self.facts = self.wire.counts
        self.facts |= {"engine": "server", "url": self.url, "served_model": self.served}

    def count(self, usage: _Usage) -> None:
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
    """Samples from a server. `ends` are the end tokens to leave out of ids; without them ("chat") messages are sent."""

    def __init__(self, connection: Connection, name: str, ends: set[int] | None) -> None:
        self.connection, self.server, self.name, self.ends = connection, connection.server, name, ends
        self.chat = self.server.api == "chat"
        self.max_context = connection.max_context or sys.maxsize if self.chat else connection.known_context()
        self.facts = connection.facts
        self.facts |= {"api": self.server.api, "dialect": self.server.dialect}

    def sample(
        self, requests: Sequence[Request], decoding: Decoding
    ) -> Iterator[tuple[int, list[Sampled | str]]]:
        """Yield (key, completions) as requests finish; a prompt that the server finds too long gets its reason."""
        if decoding.top_k and self.server.dialect == "openai":
            raise UserError(
                f"top_k = {decoding.top_k}, which {self.connection.place}.dialect = 'openai' cannot ask for; "
                f"expected 0, or the dialect 'vllm'"
            )
        asked = {request.key: request for request in requests if request.seeds}
        parts: dict[int, dict[int, list[Sampled | str]]] = {key: {} for key in asked}
        for (key, start), answer in self.connection.wire.ask(self._calls(asked.values(), decoding)):
            parts[key][start] = answer
            if sum(map(len, parts[key].values())) == len(asked[key].seeds):
                yield key, [one for _, part in sorted(parts.pop(key).items()) for one in part]

    def _calls(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Call[list[Sampled | str]]]:
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
                    partial(self._read, seeds),
                    request.name,
                    partial(_too_long, len(seeds)),
                )

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
            }
        if self.server.seeds:  # 31 bits are what every server takes
            body["seed"] = seeds[0] if self.server.dialect == "vllm" else seeds[0] % 2**31
        return body

    def _read(self, seeds: Sequence[int], content: bytes) -> list[Sampled | str]:
        answer = _Completions.model_validate_json(content)
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        if [choice.index for choice in choices] != list(range(len(seeds))):
            raise ValueError(f"{len(choices)} choices, expected {len(seeds)}")
        read = [
            self._sampled(one, seed, answer.usage, len(seeds))
            for one, seed in zip(choices, seeds, strict=True)
        ]
        self.connection.count(answer.usage)
        return read

    def _sampled(self, choice: _Choice, seed: int, usage: _Usage, of: int) -> Sampled | str:
        reason = choice.finish_reason
        if reason in ("abort", "error"):
            raise ValueError(f"a completion that ended with {reason!r}")
        if reason not in ("stop", "length"):
            return f"the server ended the completion with {reason!r}"
        if choice.message is not None and choice.message.refusal:
            return f"the model refused: {choice.message.refusal[:200]!r}"
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
        # a stop string ends within a token; an end token is at the end
        if self.ends is None or ids is None or (reason == "stop" and not self.ends.intersection(ids[-1:])):
            return Sampled([], reason, seed, text, counted, usage.prompt_tokens)
        return Sampled(
            ids[:-1] if reason == "stop" else ids, reason, seed, None, counted, usage.prompt_tokens
        )


def _too_long(count: int, message: str) -> list[Sampled | str] | None:
    """The reason why a prompt has no completions, where it is the prompt's length."""
    known = "maximum context length" in message  # OpenAI's words, which others repeat
    return [f"the server refuses the prompt: {message}"] * count if known else None


class ServerScorer:
    """Scores with a reward model behind vLLM's /classify: raw logits, which its answers are not unless asked for.

    vLLM reads a score at the last token, transformers at the last one that is not `pad`: so what comes after that is
    not sent, which no causal model can tell.
    """

    def __init__(self, connection: Connection, name: str, probe: list[int], pad: int | None) -> None:
        """`probe` is any short text in tokens, scored with and without activation to see that this is a choice."""
        self.pad = pad
        self.connection, self.name, self.facts = connection, name, connection.facts
        self.max_context = connection.known_context()
        self.url = f"{connection.url.removesuffix('/v1')}/classify"
        if not connection.server.trust_scores:
            raw, activated = (self._probe(probe, activation) for activation in (False, True))
            if raw == activated:
                raise UserError(
                    f"{connection.place}: {self.url} gives {raw} with and without activation, expected raw logits; "
                    f"set {connection.place}.trust_scores = true if they are"
                )

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        """Raw logits in the order of the requests and their completions."""
        found = [[0.0] * len(request.completions) for request in requests]
        most = self.connection.server.completions_per_request or SCORES_PER_REQUEST
        calls = (
            self._call(
                (number, start),
                [request.prompt_ids + ids for ids in request.completions[start : start + most]],
            )
            for number, request in enumerate(requests)
            for start in range(0, len(request.completions), most)
        )
        for (number, start), answer in self.connection.wire.ask(calls):
            found[number][start : start + len(answer)] = answer
        return found

    def _probe(self, ids: list[int], activation: bool) -> float:
        return self.connection.wire.one(self._call(None, [ids], activation), OPENING_RETRIES)[0]

    def _call(self, key: Any, sequences: list[list[int]], activation: bool = False) -> Call[list[float]]:
        body = {
            "model": self.connection.served,
            "input": [self._unpadded(ids) for ids in sequences],
            "use_activation": activation,
        }
        return Call(
            key, self.url, body, partial(self._read, len(sequences)), f"{len(sequences)} conversations"
        )

    def _unpadded(self, ids: list[int]) -> list[int]:
        end = len(ids)
        while end > 1 and ids[end - 1] == self.pad:
            end -= 1
        return ids[:end]

    def _read(self, expected: int, content: bytes) -> list[float]:
        answer = _Classes.model_validate_json(content)
        classes = sorted(answer.data, key=lambda one: one.index)
        if [one.index for one in classes] != list(range(expected)):
            raise ValueError(f"{len(classes)} scores, expected {expected}")
        labels = max(len(one.probs) for one in classes)
        if labels != 1 or any(len(one.probs) != 1 for one in classes):
            raise UserError(
                f"{self.connection.place}: '{self.connection.served}' has {labels} logits, expected one"
            )
        self.connection.count(answer.usage)
        return [one.probs[0] for one in classes]
