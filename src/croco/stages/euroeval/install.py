"""EuroEval's environment: it wants a Python of 3.12 or later, and pins libraries that are not ours. Made by `venv` from
a Python of this machine, or by uv where there is none; versions are in `euroeval-constraints.txt`."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from croco.config.evaluation import VERSION
from croco.errors import UserError

CONSTRAINTS = Path(__file__).with_name("euroeval-constraints.txt")
NEWEST, OLDEST = 14, 12  # minor versions of Python 3 that EuroEval and what it needs run on


def install(to: Path | None, python: str | None, say: Callable[[str], None]) -> Path:
    """Make the environment in `to`, or finish one that was left half made; returns its Python."""
    folder = (to or Path(".venv-euroeval")).absolute()
    made = folder / "bin" / "python"
    if not _is_new_enough(made):
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"{folder} is there and is no environment with Python 3.{OLDEST}, expected another --to"
            )
        _make(folder, python, say)
    words = [str(made), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    say(f"installing euroeval {VERSION} in {folder}")
    _run([*words, "-c", str(CONSTRAINTS), f"euroeval=={VERSION}"])
    return made


def _make(folder: Path, python: str | None, say: Callable[[str], None]) -> None:
    """An empty environment with pip."""
    if python is not None and not _is_new_enough(Path(python)):
        raise UserError(f"--python {python}: expected a Python of 3.{OLDEST} or later")
    chosen = Path(python) if python is not None else next(filter(_is_new_enough, _pythons()), None)
    if chosen is not None:
        say(f"using {chosen}")
        return _run([str(chosen), "-m", "venv", str(folder)])
    if uv := shutil.which("uv"):
        say(f"using {uv}, which brings a Python")
        return _run([uv, "venv", "--seed", "--python", f"3.{OLDEST}", str(folder)])
    raise UserError(
        f"euroeval needs Python 3.{OLDEST} or later, and found none here: install one or uv, or name it with --python"
    )


def _pythons() -> Iterator[Path]:
    """Where a Python may be: this one, those on the path, those of pyenv."""
    yield Path(sys.executable)
    names = [f"python3.{minor}" for minor in range(OLDEST, NEWEST + 1)]
    for name in names:
        if place := shutil.which(name):
            yield Path(place)
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for minor in range(OLDEST, NEWEST + 1):
        yield from sorted(pyenv.glob(f"3.{minor}.*/bin/python"))


def _is_new_enough(python: Path) -> bool:
    """Whether this is a Python of the right age that starts (pyenv leaves shims that do not)."""
    code = f"import sys, venv; sys.exit(not (3, {OLDEST}) <= sys.version_info[:2] <= (3, {NEWEST}))"
    try:
        return subprocess.run([str(python), "-c", code], capture_output=True, timeout=60).returncode == 0
    except OSError:
        return False


def _run(words: list[str]) -> None:
    """A command whose output the person sees; raises UserError when it fails."""
    if subprocess.run(words).returncode:
        raise UserError(f"`{' '.join(words)}` failed, what it said is above; run it again to go on")
