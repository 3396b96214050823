"""What the tests with vLLM need besides fixtures."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

WIDTH = 128  # of a tiny model, four heads of 32: vLLM's CPU kernels take no smaller ones


def overrides(*roles: str) -> list[str]:
    """What makes the tiny recipe run these roles on vLLM."""
    return ["runtime.vllm.enforce_eager=true"] + [f"runtime.engines.{role}=vllm" for role in roles]


def engines_of(parent: int) -> list[int]:
    """Processes of vLLM's that a process started and that live."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a zombie too
            if "VLLM::" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def log_tail(path: Path, num_chars: int = 3000) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-num_chars:]
