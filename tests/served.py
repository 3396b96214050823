"""A real OpenAI-compatible server on loopback, over our own engines: it samples and scores with the tiny models.

What a test wants to see of it is there: how many requests came, with which headers and bodies, and how many at once.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from croco.models.chat_template import prompt_ids
from croco.models.loading import load_policy, load_reward
from croco.models.protocols import Decoding, Request, ScoreRequest
from croco.models.transformers import HFSampler, HFScorer

OPENAI_FIELDS = {"model", "messages", "prompt", "n", "max_tokens", "temperature", "top_p", "stop", "seed"}


class No(Exception):
    """A refusal with a status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Served:
    """The server's models, its habits, and what it has seen. `strict` is how OpenAI's own API is: no other fields."""

    policy: Path
    reward: Path | None = None
    key: str = ""
    strict: bool = False
    switch: bool = True  # whether use_activation is obeyed
    end_every: int = 0  # it ends every so many'th completion by its content filter
    names: tuple[str, ...] = ()  # what it calls the policy; its folder if there are none
    url: str = ""
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # (path, body) of every POST

    def __post_init__(self) -> None:
        self.model, self.tokenizer = load_policy(str(self.policy))
        self.sampler = HFSampler(self.model, self.tokenizer, 512)
        self.names = self.names or (str(self.policy), str(self.reward))
        self.lock, self.drawn = threading.Lock(), 0
        if self.reward is not None:
            self.scorer = HFScorer(*load_reward(str(self.reward)))

    def answer(self, path: str, headers: Any, body: dict[str, Any] | None) -> dict[str, Any]:
        if self.key and headers.get("Authorization") != f"Bearer {self.key}":
            raise No(401, f"Incorrect API key provided: {headers.get('Authorization')}")
        if path == "/v1/models":
            return {"data": [{"id": name, "max_model_len": self.sampler.max_context} for name in self.names]}
        if body is None:
            raise No(404, "Not Found")
        self.seen.append((path, body))
        if body["model"] not in self.names:
            raise No(404, f"The model `{body['model']}` does not exist.")
        with self.lock, torch.inference_mode():
            if path == "/classify":
                return self.classify(body)
            return self.complete(body, chat=path == "/v1/chat/completions")

    def complete(self, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        if self.strict and not set(body) <= OPENAI_FIELDS:
            raise No(400, f"Unrecognized request argument supplied: {sorted(set(body) - OPENAI_FIELDS)[0]}")
        ids = prompt_ids(self.tokenizer, body["messages"]) if chat else body["prompt"]
        if "stop" in body:
            raise No(400, "stop strings are left to the tests on vLLM")
        if len(ids) >= self.sampler.max_context:
            raise No(400, f"This model's maximum context length is {self.sampler.max_context} tokens.")
        seed = body.get("seed", 0)
        asked = Request(0, ids, [(seed + i) % 2**63 for i in range(body["n"])])
        decoding = Decoding(body["temperature"], body["top_p"], body.get("top_k", 0), body["max_tokens"])
        ((_, drawn),) = self.sampler.sample([asked], decoding)
        choices = []
        for index, one in enumerate(drawn):
            text = self.tokenizer.decode(one.ids, skip_special_tokens=True)
            self.drawn += 1
            ended = self.end_every and self.drawn % self.end_every == 0
            reason = "content_filter" if ended else one.finish_reason
            choice: dict[str, Any] = {"index": index, "finish_reason": reason}
            choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            if body.get("return_token_ids"):
                choice["token_ids"] = one.ids + [2] * (one.finish_reason == "stop")
            choices.append(choice)
        counted = sum(one.completion_tokens for one in drawn)
        return {"choices": choices[::-1], "usage": {"prompt_tokens": len(ids), "completion_tokens": counted}}

    def classify(self, body: dict[str, Any]) -> dict[str, Any]:
        scores = torch.tensor(self.scorer.score([ScoreRequest(0, [], body["input"])])[0])
        if body["use_activation"] or not self.switch:
            scores = scores.sigmoid()
        data = [{"index": i, "probs": [score]} for i, score in enumerate(scores.tolist())]
        return {"data": data, "usage": {"prompt_tokens": sum(map(len, body["input"]))}}


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # five by default: more connections at once are reset


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """An HTTP server on a free port of loopback, in threads; yields its address without a path."""
    server = Listener(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """What both servers of the tests need: keep-alive, bodies, no log."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serve(served: Served) -> Iterator[Served]:
    """The server on loopback for as long as the block lasts; `served.url` is its address, with /v1."""

    class Answers(Handler):
        def do_GET(self) -> None:
            self.answer(None)

        def do_POST(self) -> None:
            self.answer(json.loads(self.body()))

        def answer(self, body: dict[str, Any] | None) -> None:
            try:
                status, found = 200, served.answer(self.path, self.headers, body)
            except No as no:
                status, found = no.status, {"error": {"message": str(no)}}
            with suppress(BrokenPipeError, ConnectionResetError):  # the client may have gone
                self.reply(status, json.dumps(found).encode(), Content_Type="application/json")

    with listening(Answers) as address:
        served.url = f"{address}/v1"
        yield served
