"""vLLM's own OpenAI-compatible server of a test's model, started as the product starts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from croco.config.runtime import Vllm
from croco.models import vllm_server

SECONDS = 300  # to start, on a machine that is busy


@dataclass(frozen=True)
class Server:
    """A running server: its address ("http://127.0.0.1:PORT/v1"), the name it serves under, the model's folder."""

    url: str
    name: str
    model: Path


@contextmanager
def serve(model: Path, name: str, log: Path, *options: str) -> Iterator[Server]:
    """A server of this model for as long as the context lasts; its output goes to `log`."""
    words = ["--model", str(model), *options]
    eager = Vllm(enforce_eager=True)
    with vllm_server.serve(
        words, name, "float32", vllm=eager, python=None, seconds=SECONDS, log=log
    ) as serving:
        yield Server(serving.url, name, model)
