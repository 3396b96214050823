"""A stand-in for the hub on loopback: the requests of huggingface_hub's client for repositories, files and commits."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "hf_" + "k" * 12
SMALL = 400  # bytes above which a file goes by way of the large ones
REPOSITORY = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(.*))?")


@dataclass
class Hub:
    """Repositories by kind and name, each with its files; `fails` is an address that breaks."""

    url: str = ""
    repositories: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    private: dict[tuple[str, str], bool] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    fails: str = "never"

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        path = path.partition("?")[0]
        if path.startswith("/large/"):
            self.large[path.removeprefix("/large/")] = body
            return 200, {}
        if headers.get("Authorization") != f"Bearer {KEY}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        if self.fails in path:
            return 400, {"error": f"{path} breaks"}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.url}/large/{one['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        kind, name, rest = REPOSITORY.fullmatch(path).groups()
        if (kind, name) not in self.repositories:
            return 404, {"error": "Repository not found"}
        files, rest = self.repositories[kind, name], rest or ""
        if rest.startswith("tree/"):
            return 200, [
                {"type": "file", "path": p, "size": len(b), "oid": "0" * 40} for p, b in files.items()
            ]
        if rest.startswith("preupload/"):
            modes = {True: "regular", False: "lfs"}
            asked = json.loads(body)["files"]
            return 200, {
                "files": [
                    {"path": f["path"], "uploadMode": modes[f["size"] <= SMALL], "shouldIgnore": False}
                    for f in asked
                ]
            }
        if rest.startswith("commit/"):
            return self.commit(kind, name, files, body)
        siblings = [{"rfilename": path} for path in files]
        return 200, {"id": name, "sha": "0" * 40, "siblings": siblings, "private": self.private[kind, name]}

    def create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        kind, name = asked.get("type", "model"), f"{asked['organization']}/{asked['name']}"
        url = f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if asked["organization"] == "forbidden":
            return 403, {"error": "Forbidden"}
        if (kind, name) in self.repositories:
            return 409, {"error": "You already created this repo", "url": url}
        self.repositories[kind, name] = {".gitattributes": b""}
        self.private[kind, name] = asked.get("private") or asked.get("visibility") == "private"
        return 200, {"url": url, "name": name}

    def commit(self, kind: str, name: str, files: dict[str, bytes], body: bytes) -> tuple[int, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.commits.append(name)
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}


@contextmanager
def hub() -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = found.answer(self.command, self.path, self.headers, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = _serve

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
