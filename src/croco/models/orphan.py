"""The end of vLLM's engine process when the process that started it is killed.

vLLM computes in a process of its own, which outlives a SIGKILL of ours and keeps the GPU's memory, so that a resumed
run would find none. vLLM calls `watch` in each of its processes (our entry point in `vllm.general_plugins`); it does
something only in the engine process of a croco. What vLLM starts from there, it ends itself. Imports no vLLM.
"""

import os
import signal
import threading
import time

PARENT = "CROCO_VLLM_PARENT"  # the process whose engine this is
SECONDS = 1.0


def watch() -> None:
    """In an engine process that a croco started: SIGKILL oneself once that croco is gone."""
    if os.environ.get(PARENT) == str(os.getppid()):
        threading.Thread(target=_end_with, args=(os.getppid(),), name="croco-orphan", daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
