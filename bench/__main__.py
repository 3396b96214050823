"""Every benchmark here, one after the other, each written to `docs/results/bench-NAME.md` with versions and machine.

    make bench                    # all of them
    python -m bench pairing       # some

A benchmark is a file of this folder that prints its figures when it is run; it runs in a process of its own, so that
none inherits another's threads or memory. Nothing is written for one that fails.
"""

import platform
import subprocess
import sys
from pathlib import Path

import psutil

from croco.storage import provenance
from croco.storage.files import write_text

SKIPPED = 75  # the exit code of a benchmark that lacks what it needs, and says so
HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results"


def processor() -> str:
    """The processor's name, where the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "an unnamed processor"


def page(path: Path, figures: str) -> str:
    """What a benchmark printed, with what it ran on."""
    here = provenance.here()
    libraries = ", ".join(f"{name} {version}" for name, version in here["libraries"].items())
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"# bench/{path.name}\n\nMade by `make bench`, never by hand.\n\n```\n{figures.strip()}\n```\n\n"
        f"- machine: {here['machine']}, {processor()}, {psutil.cpu_count()} cores, {memory:.0f} GiB\n"
        f"- versions: {libraries}\n- commit: {here['commit'] or 'unknown'}\n- time: {here['time']}\n"
    )


def main() -> None:
    every = {path.stem: path for path in sorted(HERE.glob("*.py")) if not path.name.startswith("_")}
    for name in sys.argv[1:] or every:
        if name not in every:
            sys.exit(f"no benchmark {name}, expected one of {', '.join(every)}")
        path = every[name]
        print(f"bench/{path.name}", flush=True)
        done = subprocess.run([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout, flush=True)
        if done.returncode == SKIPPED:
            continue
        done.check_returncode()
        write_text(RESULTS / f"bench-{path.stem}.md", page(path, done.stdout))


if __name__ == "__main__":
    main()
