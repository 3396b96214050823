"""A small proxy that breaks things: it stands in front of a real server and spoils the answers it is told to spoil."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from itertools import cycle
from typing import Any
from urllib.parse import urlsplit

from served import Handler, listening

# what a request may meet, once or twice, before it is passed on
FAULTS = (
    "drop",  # the connection is closed without a byte
    "half",  # and in the middle of the body
    "truncated",  # whole by its length, but the JSON ends early
    "html",  # a page of some gateway, with status 200
    "500",
    "503",
    "429",
    "429 later",  # with Retry-After in seconds
    "429 date",  # and as a date
    "slow",  # an answer after the client's patience
    "trickle",  # a byte now and then
    "fewer",  # one choice too few
    "more",  # and one twice
    "unfinished",  # no finish_reason
)


@dataclass
class Faulty:
    """`plan[body]` are the faults still to come for a request; `always` is one for every request after `good` ones."""

    target: str
    patience: float  # the client's time-out in seconds
    seed: int | None = None  # of a plan that gives each new request up to two faults
    always: str = ""
    good: int = 0
    delay: float = 0.0  # before every answer
    url: str = ""
    met: Counter[str] = field(default_factory=Counter)
    times: dict[bytes, list[tuple[float, str]]] = field(default_factory=dict)  # body -> (when, fault)
    at_once: int = 0
    most_at_once: int = 0

    def __post_init__(self) -> None:
        self.rng, self.lock, self.plan = random.Random(self.seed), threading.Lock(), {}
        self.deal = cycle(self.rng.sample(FAULTS, len(FAULTS)))
        self.stopped = threading.Event()

    def fault(self, body: bytes) -> str:
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            if body not in self.plan:
                count = self.rng.choice([0, 1, 1, 2]) if self.seed is not None else 0
                self.plan[body] = [next(self.deal) for _ in range(count)]
            found = self.plan[body].pop() if self.plan[body] else ""
            if self.always and self.met.total() >= self.good:
                found = self.always
            self.met[found] += 1
            self.times.setdefault(body, []).append((time.monotonic(), found))
            return found

    def passed_on(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.target).netloc, timeout=60)
        kept = {name: headers[name] for name in ("Authorization", "Content-Type") if headers[name]}
        connection.request(method, path, body or None, kept)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, content


@contextmanager
def in_front_of(target: str, patience: float = 5.0, **how: Any) -> Iterator[Faulty]:
    """The proxy on loopback; only POSTs meet faults. `url` is its address, with /v1."""
    faulty = Faulty(target, patience, **how)

    class Proxy(Handler):
        def do_GET(self) -> None:
            self.reply(*faulty.passed_on("GET", self.path, self.headers, b""))

        def do_POST(self) -> None:
            body = self.body()
            fault = faulty.fault(body)
            faulty.stopped.wait(faulty.delay)
            try:
                self.meet(fault, body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client has gone, as a client may
            finally:
                with faulty.lock:
                    faulty.at_once -= 1

        def meet(self, fault: str, body: bytes) -> None:
            if fault == "drop":
                self.hang_up()
            elif fault == "html":
                self.reply(200, b"<html>Bad gateway</html>")
            elif fault in ("500", "503"):
                self.reply(int(fault), b"worker died")
            elif fault.startswith("429"):
                date = formatdate(time.time() + 2, usegmt=True)
                waits = {"429 later": "1", "429 hour": "3600", "429 date": date}
                headers = {"Retry_After": waits[fault]} if fault in waits else {}
                self.reply(429, b'{"error": {"message": "Rate limit reached"}}', **headers)
            else:
                self.spoil(fault, *faulty.passed_on("POST", self.path, self.headers, body))

        def spoil(self, fault: str, status: int, content: bytes) -> None:
            if fault == "slow":
                faulty.stopped.wait(faulty.patience * 1.5)
            elif fault == "truncated":
                content = content[: len(content) * 2 // 3]
            elif fault in ("fewer", "more", "unfinished"):
                content = self.other_choices(fault, content)
            if fault not in ("half", "trickle"):
                self.reply(status, content)
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            for byte in content[: len(content) // 2]:
                self.wfile.write(bytes([byte]))
                if fault == "trickle" and faulty.stopped.wait(faulty.patience / 20):
                    break
            self.hang_up()

        def other_choices(self, fault: str, content: bytes) -> bytes:
            found = json.loads(content)
            name = "choices" if "choices" in found else "data"
            if fault == "fewer" or name == "data":
                found[name].pop()
            elif fault == "more":
                found[name].append(found[name][0])
            else:
                del found[name][0]["finish_reason"]
            return json.dumps(found).encode()

        def hang_up(self) -> None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    with listening(Proxy) as address:
        faulty.url = f"{address}/v1"
        try:
            yield faulty
        finally:
            faulty.stopped.set()
