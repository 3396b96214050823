"""A real `croco` process to kill: what `test_kill_resume.py` starts."""

from __future__ import annotations

import os
import signal
import sys

# what changes the disk, as Python reports it; fsync, which it does not report, is wrapped
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")


def croco(words: list[str], log: str, calls: str | None = None, kill_at: int | None = None) -> None:
    """Run the command line in this process, its output in a file.

    With `calls`, a file gets a line for every system call that changes the disk, before it is made; before number
    `kill_at` of them the process kills itself.
    """
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if calls is not None:
        _count(calls, kill_at)
    from croco.cli.main import app

    app(words, prog_name="croco")


def _count(calls: str, kill_at: int | None) -> None:
    note = os.open(calls, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    made = 0

    def count(name: str, what: object) -> None:
        nonlocal made
        if made == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(note, f"{name} {what}\n".encode())
        made += 1

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in CHANGES:
            count(event, arguments[0])
        elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            count("open", arguments[0])

    sync = os.fsync

    def fsync(descriptor: int) -> None:
        count("fsync", descriptor)
        sync(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)
