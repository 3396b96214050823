"""Where and with what a stage was computed: recorded beside every table, never part of a fingerprint."""

import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from croco import __version__

LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "polars", "pyarrow", "numpy")


@cache
def commit() -> str | None:
    """The git commit of the running source, with '+' when files differ from it; None outside a repository."""
    here = Path(__file__).parents[1]
    try:
        head, changed = (
            subprocess.run(
                ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
            )
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno", "."))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


@cache
def libraries() -> dict[str, str]:
    """Versions of the libraries that compute, as installed (no import)."""
    versions = {"python": platform.python_version(), "croco": __version__}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def here() -> dict[str, Any]:
    """Commit, libraries, machine and time."""
    return {
        "commit": commit(),
        "libraries": libraries(),
        "machine": f"{platform.system()} {platform.machine()}",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def shown(value: Any, limit: int = 60) -> str:
    """A value for a message, on one line and not longer than `limit`."""
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def without_folders(name: str) -> str:
    """A model or data set as a card names it: of a path only its last part."""
    is_path = Path(name).is_absolute() or name.startswith(("~", ".")) or Path(name).exists()
    return Path(name).name if is_path else name


def table_cell(text: str) -> str:
    """Text of a file as one cell of a table in Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
