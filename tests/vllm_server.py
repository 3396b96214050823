"""vLLM's own OpenAI-compatible server as a process of the test's, on a free loopback port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    words += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
    words += ["--dtype", "float32", "--enforce-eager", *options]
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as file:
        # a session of its own, so that stopping it stops what it started
        process = subprocess.Popen(
            words, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait_until_ready(process, f"http://127.0.0.1:{port}/health", log)
            yield Server(f"http://127.0.0.1:{port}/v1", name, model)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], health: str, log: Path) -> None:
    """Return once the server answers; fail with the end of its output when it has ended or takes too long."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(health, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"the server did not start: {log.read_text(errors='replace')[-3000:]}")
