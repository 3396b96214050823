"""The tests that run EuroEval itself: `make test-euroeval` has both environments for them, vLLM's and EuroEval's."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

PYTHON = Path(os.environ.get("CROCO_EUROEVAL_PYTHON", ".venv-euroeval/bin/python"))
collect_ignore_glob = [] if find_spec("vllm") and PYTHON.exists() else ["test_*.py"]

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
