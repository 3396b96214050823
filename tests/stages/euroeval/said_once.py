"""In EuroEval's place, for what EuroEval would need minutes and gigabytes to do: it says what EuroEval said once.

It takes the launcher's input and writes the lines of a results file that EuroEval wrote; at which dataset it fails or
dies, which version it claims, and how many of it wait for each other, is in `habits.json` beside that file. Called as
vLLM's server it says which name it serves. `test_lab.py` runs EuroEval itself.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.request import urlopen


def main(folder: Path) -> None:
    asked = json.load(sys.stdin)
    habits = json.loads((folder / "habits.json").read_text())
    with (folder / "asked.jsonl").open("a") as file:
        seen = {"key": os.environ["OPENAI_API_KEY"], "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
        file.write(json.dumps(asked | seen) + "\n")
    if habits.get("dies_at") == "start":
        sys.exit("Killed by something")
    say(libraries={"python": "3.12.1", "euroeval": habits.get("version", "18.3.0")})
    said = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    by_name = {line["evaluation_results"][0]["source_data"]["dataset_name"]: line for line in said}
    unknown = [name for name in asked["known"] if name not in by_name]
    say(unknown=unknown)
    if unknown:
        return
    meet(folder, int(habits.get("together", 1)))
    for name in asked["datasets"]:
        if name == habits.get("dies_at"):
            print("Killed by something", file=sys.stderr)
            sys.exit(3)
        if name == habits.get("server_ends_at"):
            with suppress(OSError):
                urlopen(f"{asked['url']}/end")
            time.sleep(0.5)  # until it is gone
            say(dataset=name, error="Connection refused")
            time.sleep(120)  # no other dataset can be done now
        if name == habits.get("fails_at"):
            say(dataset=name, error="Failed to generate text,\nafter 10 attempts.")
            continue
        line = by_name[name] | {"model_info": by_name[name]["model_info"] | {"name": asked["model"]}}
        with Path("euroeval_benchmark_results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        say(dataset=name)
    if habits.get("dies_at") == "end":
        sys.exit(3)


def meet(folder: Path, number: int) -> None:
    """Wait until so many of this program run at once."""
    mark, end = folder / f"here-{os.getpid()}", time.monotonic() + 120
    mark.touch()
    while len(list(folder.glob("here-*"))) < number:
        if time.monotonic() > end:
            sys.exit("the others never came")
        time.sleep(0.05)


def serve(folder: Path, words: list[str]) -> None:
    port, name = (words[words.index(word) + 1] for word in ("--port", "--served-model-name"))
    (folder / f"server-{os.environ.get('CUDA_VISIBLE_DEVICES')}").write_text(" ".join(words))

    class Names(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith("/end"):
                print("The GPU fell off the bus", file=sys.stderr, flush=True)
                os._exit(1)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": name, "max_model_len": 512}]}).encode())

    HTTPServer(("127.0.0.1", int(port)), Names).serve_forever()


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


where, given = Path(sys.argv[1]), sys.argv[2:]
serve(where, given) if "--port" in given else main(where)
