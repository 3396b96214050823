"""A policy behind vLLM's own OpenAI-compatible server, as a process of ours on loopback, for programs that ask one.

An adapter is merged into the weights first, which are written where the caller says, with the chat template. The server
ends with this process, however this one ends. vLLM is started, never imported: it may live in another environment.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from croco.config.models import Policy
from croco.config.runtime import Server, Vllm
from croco.errors import UserError
from croco.storage.hashing import local_model

PATIENCE = 60.0  # seconds that a server has to end by itself
# what a model's generation_config.json would add to requests that do not say it; its end tokens stay
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
NEUTRAL |= {"top_p": 1.0, "top_k": 0, "min_p": 0.0}


@dataclass(frozen=True)
class Serving:
    """A running server: its address with /v1, the longest context it takes, and the process, when it is ours."""

    url: str
    max_context: int | None
    process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self.process is None or self.process.poll() is None


def check(python: str | None, key: str) -> None:
    """Raise UserError naming the key when there is no vLLM to start; another environment is only looked at."""
    if python is None and find_spec("vllm") is None:
        raise UserError(
            f"vLLM is not installed here: expected {key} to name the Python of an environment that has it, "
            f"or runtime.euroeval.urls"
        )
    if python is not None and not Path(python).exists():
        raise UserError(f"{key} = '{python}': no such program")


def merge(policy: Policy, dtype: str, adapter: Path, folder: Path) -> Path:
    """The policy with an adapter merged into its weights, as a model folder of its own; made once."""
    done = folder / "merged.done"
    if done.exists():
        return folder
    from croco.models.loading import load_policy, quiet_loading

    template = Path(policy.chat_template) if policy.chat_template else None
    model, tokenizer = load_policy(
        policy.model,
        policy.revision,
        dtype,
        "cpu",  # the GPU's memory is the server's
        adapter,
        template,
        policy.trust_remote_code,
    )
    with quiet_loading():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done.touch()
    return folder


def free_gpu() -> None:
    """Give back what earlier stages of this process left reserved on the GPU: a server takes its share of the whole."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def serve(
    policy: Policy,
    merged: Path | None,
    name: str,
    dtype: str,
    *,
    vllm: Vllm,
    python: str | None,
    seconds: float,
    log: Path,
) -> Iterator[Serving]:
    """vLLM's server of a merged policy, or of the policy itself, under one name, while the context lasts."""
    free_gpu()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [python or sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", name, "--dtype", dtype]
    words += model_words(policy, merged) + vllm_words(vllm)
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"} | os.environ
    with log.open("ab") as file, started(words, environment, file) as process:
        url = f"http://127.0.0.1:{port}/v1"
        yield Serving(url, _wait_until_ready(process, url, name, seconds, log), process)


def model_words(policy: Policy, merged: Path | None) -> list[str]:
    """The words that say which model is served."""
    if merged is not None:
        words = ["--model", str(merged)]
    else:
        words = ["--model", str(local_model(policy.model, "policy.model") or policy.model)]
        words += ["--revision", policy.revision] if policy.revision else []
        words += ["--chat-template", policy.chat_template] if policy.chat_template else []
    return words + (["--trust-remote-code"] if policy.trust_remote_code else [])


def vllm_words(vllm: Vllm) -> list[str]:
    """[runtime.vllm] as words; what is left out is vLLM's own choice."""
    words = ["--tensor-parallel-size", str(vllm.tensor_parallel)]
    words += ["--override-generation-config", json.dumps(NEUTRAL)]
    if "gpu_memory_utilization" in vllm.model_fields_set:
        words += ["--gpu-memory-utilization", str(vllm.gpu_memory_utilization)]
    if vllm.max_model_len is not None:
        words += ["--max-model-len", str(vllm.max_model_len)]
    return words + (["--enforce-eager"] if vllm.enforce_eager else [])


@contextmanager
def started(
    words: list[str],
    environment: Mapping[str, str],
    log: IO[bytes],
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = None,
    cwd: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a session of its own, ended with the context and with this process; its words go to `log`."""
    process = subprocess.Popen(
        words,
        env=dict(environment),
        cwd=cwd,
        stdin=stdin,
        stdout=log if stdout is None else stdout,
        stderr=log,
        start_new_session=True,
        preexec_fn=_end_with_parent(),
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _end_with_parent() -> Callable[[], None] | None:
    """For a child to be told to end when we are killed; Linux alone has it."""
    if sys.platform != "linux":
        return None
    prctl, set_death_signal = ctypes.CDLL(None).prctl, 1  # looked up before the fork
    return lambda: prctl(set_death_signal, signal.SIGTERM)


def _wait_until_ready(
    process: subprocess.Popen[bytes], url: str, name: str, seconds: float, log: Path
) -> int | None:
    """The context that our server takes, once it answers; raises UserError when it ends or is not ready in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise UserError(f"vLLM's server did not start: {last_line(log)} (see {log})")
        try:
            return served_context(url, name, retries=0)
        except UserError:
            time.sleep(0.5)
    raise UserError(f"vLLM's server did not answer within {seconds:.0f} s (see {log})")


def served_context(
    url: str, name: str, place: str = "vLLM", key_variable: str | None = None, retries: int = 2
) -> int | None:
    """The longest context that a server says it takes; raises UserError when it is away or does not serve the name."""
    from croco.models import openai_server
    from croco.models.http_client import Wire

    wire = Wire(Server(url=url, key_variable=key_variable, timeout_seconds=60.0), place)
    try:
        return openai_server.served_context(wire, name, "this name", retries)
    finally:
        wire.close()


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return next((line.strip()[:500] for line in reversed(lines) if line.strip()), "it said nothing")
