"""What a server must not be able to do to its client: get the key elsewhere, fill memory, steer the terminal, or put
numbers into tables that are none."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from conftest import TinyModels
from croco.config.runtime import Server
from croco.errors import UserError, printable
from croco.models.http_client import ANSWER_BYTES, REDACTED, Call, HttpClient
from croco.models.openai_scorer import ServerScorer
from croco.models.openai_server import Connection, ServerSampler
from croco.models.protocols import Completion, Decoding, Request, ScoreRequest
from croco.models.vllm_server import ask_context
from served import Handler, listening

KEY = "sk-croco-test-4711"
MODEL = {"id": "m", "max_model_len": 512}
Behave = Callable[[str, dict[str, Any]], tuple[int, dict[str, str], bytes]]


@contextmanager
def server(behave: Behave) -> Iterator[tuple[str, list[str | None]]]:
    """A server that does what it is told; its address, and the key of every request it got."""
    keys: list[str | None] = []

    class Behaving(Handler):
        def do_GET(self) -> None:
            self.answer({})

        def do_POST(self) -> None:
            self.answer(json.loads(self.body()))

        def answer(self, body: dict[str, Any]) -> None:
            keys.append(self.headers.get("Authorization"))
            status, headers, content = behave(self.path, body)
            self.reply(status, content, **headers)

    with listening(Behaving) as address:
        yield f"{address}/v1", keys


def said(*answers: Any) -> Behave:
    """The list of models, and then these answers as JSON, one after the other."""
    left = iter(answers)

    def behave(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        found = {"data": [MODEL]} if path.endswith("/models") else next(left)
        return 200, {}, found if isinstance(found, bytes) else json.dumps(found).encode()

    return behave


def choice(text: str = "Hi.", reason: str | None = "stop", counted: int = 2, **more: Any) -> dict[str, Any]:
    one = {"index": 0, "finish_reason": reason, "message": {"content": text}} | more
    return {"choices": [one], "usage": {"prompt_tokens": 3, "completion_tokens": counted}}


def asked(url: str, **settings: Any) -> Completion | str:
    """The one completion of a prompt, or the reason why there is none."""
    chosen = Server(url=url, api="chat", retries=0, key_variable="CROCO_KEY", **settings)
    sampler = ServerSampler(Connection(chosen, "sample", "m"), "m")
    request = Request(0, [], [1], ({"role": "user", "content": "Hello"},), "prompt 'p'")
    ((_, (found,)),) = sampler.sample([request], Decoding(1.0, 1.0, 0, 8))
    return found


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROCO_KEY", KEY)


def test_a_key_goes_to_the_recipes_address_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(said()) as (elsewhere, stolen):
        moved = lambda path, body: (302, {"Location": f"{elsewhere}/models"}, b"")  # noqa: E731
        with server(moved) as (url, keys):
            with pytest.raises(UserError, match=r"status 302 .*redirects are not followed"):
                asked(url)
            with pytest.raises(UserError, match="redirects are not followed"):
                ask_context(url, "m", "runtime.euroeval.urls.a", "CROCO_KEY")
            assert keys == [f"Bearer {KEY}"] * 2
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, elsewhere.removesuffix("/v1"))
        with server(said(choice())) as (url, keys):
            assert isinstance(asked(url.replace("127.0.0.1", "localhost")), Completion)
            assert len(keys) == 2
        assert stolen == []


def test_a_key_that_comes_back_is_in_no_error_no_table_and_no_count() -> None:
    with server(said(choice(f"The key is {KEY}."), choice(reason=f"filter {KEY}"))) as (url, _):
        assert asked(url) == "the completion repeats the key that the server was sent"
        assert asked(url) == f"the server ended the completion with 'filter {REDACTED}'"
    refusal = {"content": None, "refusal": f"no, {KEY}\x1b[2J"}
    with server(said(choice(message=refusal))) as (url, _):
        assert asked(url) == f"the model refused: 'no, {REDACTED}\\\\x1b[2J'"
    named = json.dumps({"data": [{"id": f"other-{KEY}\x1b]0;title\x07"}]}).encode()
    with server(lambda path, body: (200, {}, named)) as (url, _):
        with pytest.raises(UserError, match=r"serves other-\[the key\]") as error:
            asked(url)
        assert "\x1b" not in str(error.value)
        assert KEY not in str(error.value)


def test_ids_that_spell_the_key_and_ids_out_of_range_are_dropped(tiny_models: TinyModels) -> None:
    from croco.models.loading import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_models.policy))
    spelled = tokenizer(f"It is {KEY}", add_special_tokens=False)["input_ids"]
    answers = [
        {"choices": [{"index": 0, "finish_reason": "stop", "text": "x", "token_ids": ids}],
         "usage": {"prompt_tokens": 3}}
        for ids in (spelled, [5, len(tokenizer)], [-5], [10**30], [5, 6, 2])
    ]  # fmt: skip
    with server(said(*answers)) as (url, _):
        chosen = Server(url=url, retries=0, key_variable="CROCO_KEY")
        sampler = ServerSampler(Connection(chosen, "sample", "m"), "m", tokenizer, {2}, len(tokenizer))
        found = [
            next(sampler.sample([Request(0, [1, 5], [1])], Decoding(1.0, 1.0, 0, 30)))[1][0] for _ in answers
        ]
    assert "repeats the key" in found[0]
    assert [f"gave the token {token}, the vocabulary has" in reason
            for token, reason in zip((len(tokenizer), -5, 10**30), found[1:4], strict=True)] == [True] * 3  # fmt: skip
    assert found[4] == Completion([5, 6], "stop", 1)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (choice(counted=10**12), "completion_tokens: Input should be less than"),
        (choice(counted=-1), "completion_tokens: Input should be greater than"),
        (choice(reason=None), "finish_reason: Input should be a valid string"),
        (b"[" * 200_000, "no proper answer"),
        (b'{"choices": ' + b"9" * 5000 + b"}", "no proper answer"),
        ([1, 2], "no proper answer"),
    ],
    ids=["huge count", "negative count", "no reason", "deep", "huge number", "list"],
)
def test_an_answer_that_is_none_is_one_sentence(answer: Any, reason: str) -> None:
    with server(said(answer)) as (url, _), pytest.raises(UserError, match=reason):
        asked(url)


def test_text_that_is_none_is_dropped() -> None:
    with server(said(b'{"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "a\\ud83d"}}],'
                     b' "usage": {"prompt_tokens": 1, "completion_tokens": 1}}')) as (url, _):  # fmt: skip
        assert asked(url) == "the completion holds half of a surrogate pair, which is no text"


@pytest.mark.parametrize("score", [1e300, -1e39, float("nan")])
def test_a_score_that_float32_cannot_hold_is_one_sentence(score: float) -> None:
    answer = {"data": [{"index": 0, "probs": [score]}], "usage": {"prompt_tokens": 1}}
    with server(said(answer)) as (url, _):
        chosen = Server(url=url, retries=0, trust_scores=True)
        scorer = ServerScorer(Connection(chosen, "score", "m"), "m", [5], None)
        with pytest.raises(UserError, match="a score of"):
            scorer.score([ScoreRequest(0, [1], [[5]])])


def test_more_text_than_tokens_can_hold_is_dropped() -> None:
    with server(said(choice("x" * 2**20, counted=1))) as (url, _):
        assert asked(url) == "the server counts 1 tokens in 1,048,576 characters"


def test_a_refusal_that_is_deep_json_is_one_sentence() -> None:
    with server(lambda path, body: (400, {}, b"[" * 200_000)) as (url, _):
        with pytest.raises(UserError, match="with status 400") as error:
            asked(url)
        assert len(str(error.value)) < 600


def test_an_answer_without_end_takes_little_memory() -> None:
    stop = threading.Event()

    class Endless(Handler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            while not stop.is_set():
                try:
                    self.wfile.write(b" " * 2**20)
                except OSError:
                    break
            self.close_connection = True

    with listening(Endless) as address:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        client = HttpClient(Server(url=address, concurrency=8), "servers.x")
        calls = [Call(k, address, None, lambda found: found, "nothing") for k in range(8)]
        with pytest.raises(UserError, match=r"an answer of more than 16 MiB"):
            list(client.ask(calls, retries=0))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        stop.set()
    assert grown < 8 * 4 * ANSWER_BYTES
    packed = lambda path, body: (200, {"Content_Encoding": "gzip"}, b"x")  # noqa: E731
    with server(packed) as (url, _), pytest.raises(UserError, match="a packed answer"):
        asked(url)


def test_what_steers_a_terminal_is_written_out() -> None:
    assert (
        printable("a\x1b[31m\x07\tb\n\u202ec\u00e5\ud800\x9b") == "a\\x1b[31m\\x07\tb\n\\u202ecå\\ud800\\x9b"
    )


@pytest.mark.parametrize("url", ["http://h:99999/v1", "http://h:x/v1", "http://a..b/v1"])
def test_an_address_that_is_none_is_refused_in_the_recipe(url: str) -> None:
    with pytest.raises(ValueError, match="is no address"):
        Server(url=url)
