"""A real `croco` process to kill: what `test_kill_resume.py` starts."""

from __future__ import annotations

import os


def croco(words: list[str], log: str) -> None:
    """Run the command line in this process, its output in a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from croco.cli import app

    app(words, prog_name="croco")
