"""The one HTTP client: many requests at once, each repeated until it gets a proper answer, each counted.

What may pass by itself (dropped connections, restarts, limits, half an answer) is asked again after a growing, jittered
wait, or the one the server asked for; what may not (a bad request, a refused key) stops everything. A server is not
trusted: no redirect is followed, so the key goes to the recipe's address only; a loopback address is never reached
through a proxy; an answer has a greatest size; a key that an answer repeats is taken out of it."""

import asyncio
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from queue import SimpleQueue
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import httpx2
from pydantic import ValidationError

from croco.config.runtime import Server
from croco.errors import UserError, printable

logger = logging.getLogger(__name__)
T = TypeVar("T")

AGAIN = (408, 409, 425, 429)  # beside 500 and above: what may pass by itself
LONGEST_WAIT_SECONDS = 60.0  # of our own; a server may ask for as much as `timeout_seconds`
CONNECT_SECONDS = 30.0
ANSWER_BYTES = 2**24  # greatest size of an answer, beside what its tokens may take
SECRET_CHARACTERS = 8  # a shorter key is no secret ("EMPTY", "none"), and completions may hold such a word
REDACTED = "[the key]"


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request: its body (None for a GET), and what reads the decoded answer; a ValueError of `read` means: ask
    again. `refused` makes an answer of a refusal that would always come, or None where that ends everything."""

    key: Any
    url: str
    body: dict[str, Any] | None
    read: Callable[[Any], T]
    what: str  # what an error calls it
    refused: Callable[[str], T | None] = lambda message: None
    most_bytes: int = ANSWER_BYTES


class _Again(Exception):
    """Why a request is to be made again, and how long the server asks to wait."""

    def __init__(self, reason: str, after_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.after_seconds = after_seconds


class HttpClient:
    """Calls to one server. `counts` has requests, retries and seconds, and whatever tokens its user adds."""

    def __init__(self, server: Server, place: str, gone: Callable[[], str | None] = lambda: None) -> None:
        """`place` is the recipe's key, for errors; `gone` says why the server will not come back, if it knows. Raises
        UserError when the key's variable is not set."""
        self.gone = gone
        self.server, self.place, self.url = server, place, server.url.rstrip("/")
        self.key = _key(server.key_variable, place)
        self.counts: dict[str, Any] = {"requests": 0, "retries": 0, "request_seconds": 0.0}
        self.not_before = 0.0  # nothing is sent earlier: the server asked for a pause
        # in a thread of its own, so that it reads on while the caller writes shards
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name=place, daemon=True).start()

    def ask(
        self, calls: Iterable[Call[T]], retries: int | None = None, at_once: int | None = None
    ) -> Iterator[tuple[Any, T]]:
        """Yield (key, what was read) as answers come, `at_once` requests (else `concurrency`) being open. Raises
        UserError, after those that came, for a call that is refused or gets no proper answer in `retries` + 1 attempts.
        """
        answers: SimpleQueue[tuple[Any, T] | None] = SimpleQueue()
        retries = self.server.retries if retries is None else retries
        at_once = at_once or self.server.concurrency
        job = asyncio.run_coroutine_threadsafe(
            self._all(iter(calls), retries, at_once, answers.put), self.loop
        )
        job.add_done_callback(lambda _: answers.put(None))
        try:
            while (answer := answers.get()) is not None:
                yield answer
            job.result()
        finally:
            job.cancel()

    def one(self, call: Call[T], retries: int | None = None) -> T:
        ((_, answer),) = self.ask([call], retries)
        return answer

    async def _all(
        self, calls: Iterator[Call[T]], retries: int, at_once: int, put: Callable[[Any], None]
    ) -> None:
        async def work() -> None:
            for call in calls:  # shared by all: each takes the next
                put((call.key, await self._answer(client, call, retries)))

        async with self._client(at_once) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(at_once):
                        group.create_task(work())
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None

    def close(self) -> None:
        """End the thread that answers are read in."""
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _client(self, at_once: int) -> httpx2.AsyncClient:
        headers = {"Accept-Encoding": "identity"}  # what is sent is what is read: no answer unpacks to more
        return httpx2.AsyncClient(
            headers=headers | ({"Authorization": f"Bearer {self.key}"} if self.key else {}),
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=at_once),
            follow_redirects=False,
            trust_env=not _is_loopback(self.url),
        )

    async def _answer(self, client: httpx2.AsyncClient, call: Call[T], retries: int) -> T:
        for attempt in range(retries + 1):
            self.counts["retries"] += attempt > 0
            while (pause := self.not_before - time.monotonic()) > 0:
                await asyncio.sleep(pause + random.uniform(0, self.server.retry_seconds))
            try:
                return await self._attempt(client, call)
            except _Again as again:
                reason = str(again)
                if again.after_seconds > self.server.timeout_seconds:
                    raise UserError(
                        f"{self.place}: {self.url} asks to wait {again.after_seconds:.0f} s ({reason}); finished "
                        f"shards stay, run the same command again then"
                    ) from None
                self.not_before = max(self.not_before, time.monotonic() + again.after_seconds)
            if why := self.gone():
                raise UserError(f"{why}; finished shards stay, run the same command again to go on")
            if attempt < retries:
                wait = min(self.server.retry_seconds * 2**attempt, LONGEST_WAIT_SECONDS)
                if attempt == 2:
                    logger.warning("%s: %s: %s; trying on", self.place, call.what, reason)
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))
        raise UserError(
            f"{self.place}: {self.url} gave no proper answer to {call.what} in {retries + 1} attempts, the last time: "
            f"{reason}; finished shards stay, run the same command again to go on"
        )

    async def _attempt(self, client: httpx2.AsyncClient, call: Call[T]) -> T:
        began = time.monotonic()
        self.counts["requests"] += 1
        try:
            async with asyncio.timeout(self.server.timeout_seconds):
                response, content = await _read(client, call)
        except TimeoutError:
            raise _Again(f"nothing came within {self.server.timeout_seconds:g} s") from None
        except httpx2.RequestError as error:
            raise _Again(self.clean(f"{type(error).__name__} {error}")) from None
        except httpx2.InvalidURL as error:
            raise UserError(f"{self.place}: {self.url} is no address: {self.clean(str(error))}") from None
        finally:
            self.counts["request_seconds"] += time.monotonic() - began
        status = response.status_code
        if status in AGAIN or (status >= 500 and status != 501):  # 501: the server has no such thing
            reason = f"status {status} {self.clean(_message(content))!r}"
            raise _Again(reason, _retry_after(response.headers.get("retry-after", "")))
        if status != 200:
            message = self.clean(_message(content))
            answer = call.refused(message) if status >= 400 else None
            if answer is None:
                raise self._refusal(call.what, status, message)
            return answer
        try:
            return call.read(self._without_key(json.loads(content)))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise _Again(
                f"an answer that is not one ({place}{': ' if place else ''}{first['msg']})"
            ) from None
        except RecursionError:
            raise _Again("an answer that is not one (JSON nested too deeply)") from None
        except ValueError as error:
            raise _Again(self.clean(str(error))) from None

    def _refusal(self, what: str, status: int, message: str) -> UserError:
        hint, variable = "", self.server.key_variable
        if status == 404 and not self.url.endswith("/v1"):
            hint = "; expected the whole address of the API, which mostly ends in /v1"
        if status in (401, 403):
            expected = f"expected a key that it takes in ${variable}"
            hint = f"; {expected}" if variable else "; key_variable is not set"
        if 300 <= status < 400:
            hint = "; redirects are not followed, expected the address that it points to, if you trust it"
        return UserError(
            f"{self.place}: {self.url} refuses {what} with status {status} ({message or 'nothing said'}){hint}"
        )

    def repeats_key(self, text: str) -> bool:
        """Whether a text of the server holds the key, or held it before it was taken out."""
        return self._is_secret() and (self.key in text or REDACTED in text)

    def clean(self, text: str) -> str:
        """Text of a server as one short line without the key and without control characters."""
        return printable(" ".join(self._without_key(text[: 4096 + len(self.key)]).split()))[:300]

    def _is_secret(self) -> bool:
        return len(self.key) >= SECRET_CHARACTERS

    def _without_key(self, value: Any) -> Any:
        """Decoded JSON with the key taken out of every string."""
        if not self._is_secret():
            return value
        if isinstance(value, str):
            return value.replace(self.key, REDACTED)
        if isinstance(value, list):
            return value if value and isinstance(value[0], int) else [self._without_key(one) for one in value]
        if isinstance(value, dict):
            return {self._without_key(name): self._without_key(one) for name, one in value.items()}
        return value


async def _read(client: httpx2.AsyncClient, call: Call[Any]) -> tuple[httpx2.Response, bytes]:
    """The answer to a call and its body, which is read no further than the call allows."""
    method = "GET" if call.body is None else "POST"
    async with client.stream(method, call.url, json=call.body) as response:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise _Again("a packed answer, which was not asked for")
        content = bytearray()
        async for part in response.aiter_raw():
            content += part
            if len(content) > call.most_bytes:
                raise _Again(f"an answer of more than {call.most_bytes / 2**20:.0f} MiB")
        return response, bytes(content)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback or ip_address(host).is_unspecified
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _key(variable: str | None, place: str) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"{place}.key_variable = '{variable}', but ${variable} is not set")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"{place}.key_variable = '{variable}', but ${variable} holds what cannot be sent")
    return key


def _message(content: bytes) -> str:
    """What a server says in an error: OpenAI's field, or the text as it is."""
    text = content[:4096].decode("utf-8", "replace")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return text
    if isinstance(body, dict):
        body = body.get("error", body)
    return str(body["message"]) if isinstance(body, dict) and "message" in body else text


def _retry_after(value: str) -> float:
    """Seconds of a Retry-After header, which is a number or a date; 0 for none, and for what is neither."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
