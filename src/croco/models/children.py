"""Programs and processes that end with the one that started them, however it ends: they hold no GPU, port or lock."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

END_SECONDS = 60.0  # that a program which is told to end has for it
POLL_SECONDS = 0.2
PR_SET_PDEATHSIG = 1  # Linux: a signal for the child when its parent dies


def before_exec(number: int = signal.SIGKILL) -> Callable[[], None] | None:
    """What `subprocess` calls in a child, so that it gets this signal when we are killed; Linux alone has it."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    return lambda: prctl(PR_SET_PDEATHSIG, number)


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
        preexec_fn=before_exec(signal.SIGTERM),
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def end_with(parent: int, whole_group: bool = False) -> None:
    """In a child: SIGKILL to oneself, or to one's whole process group, once the process `parent` is gone."""

    def watch() -> None:
        while _lives(parent):
            time.sleep(POLL_SECONDS)
        os.killpg(0, signal.SIGKILL) if whole_group else os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="croco-ends-with-parent", daemon=True).start()


def _lives(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
