"""Starts vLLM's OpenAI-compatible server as a process of ours on loopback, and ends it with its context and with this
process. vLLM is never imported: it may live in another environment."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from croco.config.models import Model, Policy
from croco.config.runtime import Server, Vllm
from croco.errors import UserError
from croco.models.children import started
from croco.models.http_client import HttpClient
from croco.models.openai_server import served_context
from croco.storage.hashing import local_model

CPU_CACHE_GIB = "4"  # of keys and values, where there is no GPU and VLLM_CPU_KVCACHE_SPACE does not say
# what a model's generation_config.json would add to requests that do not say it; its end tokens stay
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
NEUTRAL |= {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # Polars and torch do not survive a fork
    "VLLM_LOGGING_LEVEL": "ERROR",  # its lines are for when it fails
}


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
            f"vLLM is not installed here: expected {key} to name the Python of an environment that has it "
            f"(see docs/guide/engines.md)"
        )
    if python is not None and not Path(python).expanduser().is_file():
        raise UserError(f"{key} = '{python}': no such program")


def merge(policy: Policy, dtype: str, adapter: Path, folder: Path) -> Path:
    """The policy with an adapter merged into its weights, as a model folder of its own; made once."""
    done = folder / "merged.done"
    if done.exists():
        return folder
    from croco.models.loading import load_causal, quiet_loading

    # the GPU's memory is the server's
    model, tokenizer = load_causal(policy.model_copy(update={"dtype": dtype}), adapter, "cpu")
    with quiet_loading():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done.touch()
    return folder


@contextmanager
def serve(
    model_words: Sequence[str],
    name: str,
    dtype: str,
    *,
    vllm: Vllm,
    python: str | None,
    seconds: float,
    log: Path,
) -> Iterator[Serving]:
    """vLLM's server of a model under one name, while the context lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(python).expanduser()) if python else sys.executable
    words = [program, "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", name, "--dtype", dtype]
    words += ["--disable-uvicorn-access-log", "--disable-log-stats", *model_words, *vllm_words(vllm)]
    environment = ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": CPU_CACHE_GIB} | os.environ
    if python is not None:  # nothing of our Python is the other's
        environment = {key: value for key, value in environment.items() if not key.startswith("PYTHON")}
    environment["PYTHONSAFEPATH"] = "1"  # a folder called vllm here is not the package
    with log.open("ab") as file, started(words, environment, file) as process:
        url = f"http://127.0.0.1:{port}/v1"
        yield Serving(url, _wait_until_ready(process, url, name, seconds, log), process)


def policy_words(policy: Policy, merged: Path | None) -> list[str]:
    """The words that say which policy is served to programs that send messages."""
    if merged is not None:
        return ["--model", str(merged)] + (["--trust-remote-code"] if policy.trust_remote_code else [])
    template = ["--chat-template", policy.chat_template] if policy.chat_template else []
    if policy.chat_template_kwargs:
        template += ["--default-chat-template-kwargs", json.dumps(policy.chat_template_kwargs)]
    return model_words(policy) + template


def model_words(model: Model) -> list[str]:
    words = ["--model", str(local_model(model.model) or model.model)]
    words += ["--revision", model.revision, "--tokenizer-revision", model.revision] if model.revision else []
    return words + (["--trust-remote-code"] if model.trust_remote_code else [])


def vllm_words(vllm: Vllm) -> list[str]:
    """[runtime.vllm] as words; what is left out is vLLM's own choice."""
    words = ["--tensor-parallel-size", str(vllm.tensor_parallel)]
    words += ["--override-generation-config", json.dumps(NEUTRAL)]
    if "gpu_memory_utilization" in vllm.model_fields_set:
        words += ["--gpu-memory-utilization", str(vllm.gpu_memory_utilization)]
    return words + (["--enforce-eager"] if vllm.enforce_eager else [])


def _wait_until_ready(
    process: subprocess.Popen[bytes], url: str, name: str, seconds: float, log: Path
) -> int | None:
    """The context that our server takes, once it answers; raises UserError when it ends or is not ready in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise UserError(f"vLLM's server did not start: {reason(log)}")
        try:
            return ask_context(url, name, retries=0)
        except UserError:
            time.sleep(0.5)
    raise UserError(f"vLLM's server did not answer within {seconds:.0f} s: {reason(log)}")


def ask_context(
    url: str, name: str, place: str = "vLLM", key_variable: str | None = None, retries: int = 2
) -> int | None:
    """The longest context that a server says it takes; raises UserError when it does not answer or serve the name."""
    client = HttpClient(Server(url=url, key_variable=key_variable, timeout_seconds=60.0), place)
    try:
        return served_context(client, name, "this name", retries)
    finally:
        client.close()


def reason(log: Path) -> str:
    """Why a program ended, by its log: its last error that is not about another one, else its last line."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    prefix, error = r"^\(\S+ pid=\d+\) |ERROR [\d-]+ [\d:]+ \[\S+\] ", r"(Error|Exception): (?!.*root cause)"
    lines = [re.sub(prefix, "", line).strip() for line in text.splitlines()]
    errors = [at for at, line in enumerate(lines) if re.search(error, line)]
    shown = lines[errors[-1] : errors[-1] + 3] if errors else [line for line in lines if line][-1:]
    return " ".join(shown)[:500] or "it said nothing"
