"""The stages `sample` and `score` on a file system that fills up, run by `test_full_disk.py` in a namespace of its own
where it may mount one: RECIPE FOLDER, prints what each command said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from croco.cli.main import app


def croco(command: str, recipe: str, folder: Path) -> None:
    found = CliRunner().invoke(app, [command, recipe])
    lines = [line for line in found.output.splitlines() if line.startswith("croco: ")]
    print(
        command,
        found.exit_code,
        repr(found.exception),
        *lines,
        *folder.rglob(".tmp-*"),
        sep=" | ",
        flush=True,
    )


def main(recipe: str, folder: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], check=True)
    croco("prompts", recipe, folder)
    for command, room in (("sample", 40_000), ("score", 30_000)):
        ballast = folder / "ballast"
        free = os.statvfs(folder)
        ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - room))
        croco(command, recipe, folder)
        print(f"{command} kept {len(list((folder / command).glob('*.done')))} shards", flush=True)
        ballast.unlink()
        croco(command, recipe, folder)
    subprocess.run(["cp", "-r", f"{folder}/.", f"{folder}-kept"], check=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
