"""An endpoint that drips, spoils, stalls or sends away costs one sentence, no more time than was given, and no key."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from lichen.core.errors import LichenError
from lichen.fm.endpoint import Endpoint
from lichen.fm.http import HttpFM

Serve = Callable[[socket.socket, int], None]


@contextmanager
def _served(serve: Serve) -> Iterator[str]:
    """A server that reads each request whole and then does as it is told, with the number of the call."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def talk(line: socket.socket, call: int) -> None:
        with line, suppress(OSError):
            data = b""
            while b"\r\n\r\n" not in data:
                data += line.recv(65536)
            head, _, body = data.partition(b"\r\n\r\n")
            length = next(int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length"))
            while len(body) < length:
                body += line.recv(65536)
            serve(line, call)

    def accept() -> None:
        call = 0
        with suppress(OSError):
            while not done.is_set():
                line, _ = listener.accept()
                threading.Thread(target=talk, args=(line, call), daemon=True).start()
                call += 1

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        done.set()
        listener.close()


def _reply(body: bytes, *, status: str = "200 OK", **headers: str) -> bytes:
    lines = [
        f"HTTP/1.1 {status}",
        f"Content-Length: {len(body)}",
        *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


TEXT = json.dumps({"choices": [{"text": "w1"}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}).encode()


def _write(url: str, **more: Any) -> list[str]:
    slept: list[float] = more.pop("slept", [])
    settings = {"model": "m", "max_retries": 1, "pause": 0.001, "timeout": 0.5, **more}
    return HttpFM(Endpoint(url=url, **settings), sleep=slept.append).generate(["w"], seeds=[1])


@pytest.mark.parametrize("at", ["head", "body"])
def test_a_server_that_drips_is_left_when_the_call_is_over(at: str) -> None:
    def drip(line: socket.socket, call: int) -> None:
        whole = _reply(TEXT * 40) if at == "body" else b"HTTP/1.1 200 OK\r\n" + b"X-More: and more\r\n" * 100
        at_once = 60 if at == "body" else 0
        line.sendall(whole[:at_once])
        for letter in whole[at_once:]:
            line.sendall(bytes([letter]))
            time.sleep(0.05)

    with _served(drip) as url:
        start = time.monotonic()
        with pytest.raises(LichenError, match=r"no answer in 2 tries, at last: TimeoutError: took more than 0\.5 sec"):
            _write(url)
        assert 0.9 < time.monotonic() - start < 20  # each reply takes more than 90 seconds


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_an_endpoint_is_left_alone_for_as_long_as_it_asks(form: str) -> None:
    later = "7" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=8), usegmt=True)
    slept: list[float] = []

    def busy(line: socket.socket, call: int) -> None:
        line.sendall(_reply(TEXT) if call else _reply(b"", status="429 Too Many", Retry_After=later))

    with _served(busy) as url:
        assert _write(url, slept=slept) == ["w1"]
    assert 5 < slept[0] <= 8


def test_who_asks_for_an_hour_is_told_of_at_once() -> None:
    def away(line: socket.socket, call: int) -> None:
        line.sendall(_reply(b"", status="503 Maintenance", Retry_After="3600"))

    slept: list[float] = []
    with _served(away) as url, pytest.raises(LichenError, match="left alone for 3600 seconds: 503 Maintenance"):
        _write(url, slept=slept)
    assert slept == []


@pytest.mark.parametrize("key", ["s3cret\n", "  s3cret", "s3cret\r\nX: y", "s3 cret", "s3crét"])
def test_a_key_is_never_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LICHEN_TEST_KEY", key)

    def refuse(line: socket.socket, call: int) -> None:
        line.sendall(_reply(b"", status="401 Unauthorized"))

    with _served(refuse) as url, pytest.raises(LichenError) as error:
        _write(url, api_key_env="LICHEN_TEST_KEY")
    assert "cret" not in str(error.value)
    assert ("refuses: 401" in error.value.what) == (key.strip() == "s3cret")


@pytest.mark.parametrize(
    "url",
    ["http://:s3cret@h/v1", "http://s3cret@h/v1", "https://u:s3cret@h/v1", "http://h:0/v1", "http://h:99999/v1",
     "http://h/v1#x", "http://h\n/v1", "http://h v/1", "http://[::1/v1", "ftp://h/v1", "http:///v1"],
)  # fmt: skip
def test_an_address_that_is_none_or_holds_a_key_is_refused(url: str) -> None:
    with pytest.raises(LichenError) as error:
        Endpoint(url=url, model="m")
    assert "s3cret" not in str(error.value)
    assert error.value.where == "endpoint.url"


REPLIES: tuple[tuple[str, dict[str, Any], Callable[[HttpFM], object]], ...] = (
    ("first", {"choices": [{"text": "w1"}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}},
     lambda fm: fm.generate(["w"], seeds=[1])),
    ("chat", {"choices": [{"message": {"role": "assistant", "content": "w1"}}]},
     lambda fm: fm.generate(["w"], seeds=[1])),
    ("chat", {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "a", "logprob": -1.5}]}]}}]},
     lambda fm: fm.score(["w"], [["a", "b"]])),
    ("first", {"choices": [{"logprobs": {"top_logprobs": [{"a": -1.5, "b": -2}]}}]},
     lambda fm: fm.score(["w"], [["a"]])),
    ("echo", {"choices": [{"logprobs": {"tokens": ["w", "a"], "text_offset": [0, 1], "token_logprobs": [None, -2.5]}}]},
     lambda fm: fm.score(["w"], [["a"]])),
    ("first", {"data": [{"index": 0, "embedding": [0.5, 1.0]}, {"index": 1, "embedding": [1, 0]}]},
     lambda fm: fm.embed(["w", "v"])),
)  # fmt: skip
WORTHLESS: tuple[Any, ...] = (
    None, True, -1, 1.5, 10**400, float("nan"), float("-inf"), "", "\ud800", [], [[]], {}, {"a": None}, [None],
    ["a", 1], 1e300,
)  # fmt: skip


def _spoiled(reply: Any, draw: random.Random) -> Any:
    """One place of it holds something else, is gone, or stands twice."""
    places: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        for key in inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ():
            places.append((inner, key))
            walk(inner[key])

    whole = {"": json.loads(json.dumps(reply))}
    walk(whole)
    where, key = draw.choice(places)
    match draw.randrange(4):
        case 0 if where is not whole:
            del where[key]
        case 1 if isinstance(where, list):
            where.insert(key, where[key])
        case _:
            where[key] = draw.choice(WORTHLESS)
    return whole[""]


@pytest.mark.parametrize("which", range(len(REPLIES)))
def test_spoiled_replies_are_one_sentence_or_an_answer(which: int) -> None:
    ask, reply, do = REPLIES[which]
    draw, bodies = random.Random(which), list[bytes]()
    for _ in range(110):
        body = json.dumps(_spoiled(reply, draw)).encode()
        if draw.random() < 0.2:
            at = draw.randrange(len(body))
            body = draw.choice((body[:at], body[:at] + b"\xff" + body[at:], b"[" * 100_000, b"\xef\xbb\xbf" + body))
        bodies.append(body)
    with _served(lambda line, call: line.sendall(_reply(bodies[call]))) as url:
        fm = HttpFM(Endpoint(url=url, model="m", ask=ask, max_retries=0, timeout=5))  # type: ignore[arg-type]
        said: list[LichenError] = []
        for _ in bodies:
            try:
                do(fm)
            except LichenError as error:
                said.append(error)
    assert len(said) > 30
    assert all(error.where and "\n" not in error.what for error in said)
