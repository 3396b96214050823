"""In EuroEval's place, for what EuroEval would need minutes and gigabytes to do: it says what EuroEval said once.

It takes the launcher's input and writes the lines of a results file that EuroEval wrote; at which dataset it fails or
dies, and which version it claims, is in `habits.json` beside that file. `test_lab.py` runs EuroEval itself.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(folder: Path) -> None:
    asked = json.load(sys.stdin)
    habits = json.loads((folder / "habits.json").read_text())
    with (folder / "asked.jsonl").open("a") as file:
        file.write(json.dumps(asked | {"key": os.environ["OPENAI_API_KEY"]}) + "\n")
    say(libraries={"python": "3.12.1", "euroeval": habits.get("version", "18.3.0")})
    said = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    by_name = {line["evaluation_results"][0]["source_data"]["dataset_name"]: line for line in said}
    unknown = [name for name in asked["datasets"] if name not in by_name]
    say(unknown=unknown)
    if unknown:
        return
    for name in asked["datasets"]:
        if name == habits.get("dies_at"):
            print("Killed by something", file=sys.stderr)
            sys.exit(3)
        if name == habits.get("fails_at"):
            say(dataset=name, error="Failed to generate text,\nafter 10 attempts.")
            continue
        line = by_name[name] | {"model_info": by_name[name]["model_info"] | {"name": asked["model"]}}
        with Path("euroeval_benchmark_results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        say(dataset=name)
    if habits.get("dies_at") == "end":
        sys.exit(3)


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


main(Path(sys.argv[1]))
