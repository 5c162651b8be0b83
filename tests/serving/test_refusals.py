"""Who may ask, and what a spoilt request gets: one error in the format's own form, from a server that lives on."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lichen.core.errors import LichenError
from lichen.serving.contract import ApiError, Completion, Piece, Prompted
from lichen.serving.guard import read_key
from lichen.serving.server import Limits, ModelServer
from lichen.serving.transformers_model import TransformersModel
from support.served import ask, at_address, raw, tiny

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "w1"}], "max_tokens": 2, "temperature": 0}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersModel]:
    found = tiny(tmp_path_factory.mktemp("tiny"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def server(model: TransformersModel) -> Iterator[ModelServer]:
    with at_address(model, limits=Limits(arrive=5.0)) as found:
        yield found


class Scripted:
    """A model that does as its first word says."""

    name, kind, load_seconds = "tiny", "scripted", 0.0

    def complete(self, request: Completion) -> Generator[Piece, None, None]:
        if request.prompt == "fault":
            raise ZeroDivisionError("secret words of a prompt")
        yield Piece(text="one")
        if request.prompt == "late fault":
            raise ApiError(502, "it ended", kind="server_error")
        while request.prompt == "wait":
            time.sleep(0.01)
            yield Piece(text="more")
        yield Piece(finish="stop", tokens_in=1, tokens_out=1)

    def prompt_logprobs(self, prompt: str, top: int) -> Prompted:
        raise ApiError(400, "none")

    def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        raise ApiError(400, "none")

    def processes(self) -> tuple[int, ...]:
        return ()

    def close(self) -> None:
        pass


def posted(server: ModelServer, data: bytes, path: str = TEXT) -> bytes:
    """A whole request, as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def refused(reply: tuple[int, dict[str, Any]]) -> tuple[int, str]:
    """``(status, message)`` of an error that has the form of all."""
    status, body = reply
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert "Traceback" not in body["error"]["message"]
    return status, body["error"]["message"]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:{port}"}, 403),
        ({"Host": "127.0.0.1:1"}, 403),
        ({"Host": "localhost:{port}"}, 200),
        ({"Host": "[::1]:{port}"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_a_page_of_elsewhere_may_not_ask(server: ModelServer, head: dict[str, str], status: int) -> None:
    head = {name: value.format(port=server.port) for name, value in head.items()}
    assert ask(server, CHAT, BODY, head=head)[0] == status
    if "Content-Type" not in head:
        assert ask(server, "/v1/models", head=head)[0] == status
    if status == 403:
        assert refused(ask(server, CHAT, BODY, head=head))[0] == status
        assert ask(server, CHAT, head=head, method="OPTIONS")[0] in (403, 405), "no page is given leave"


def test_a_key_is_asked_for(model: TransformersModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "k" * 20
    with at_address(model, key=key) as server:
        assert refused(ask(server, CHAT, BODY))[0] == 401
        for wrong in ("Bearer " + "k" * 19, "Bearer " + "ü" * 20, key, "Basic " + key):
            assert refused(ask(server, "/v1/models", head={"Authorization": wrong.encode("utf-8").decode("latin-1")}))
        assert ask(server, CHAT, BODY, head={"Authorization": f"Bearer {key}"})[0] == 200
    for host in ("0.0.0.0", "192.0.2.1", "::"):
        with pytest.raises(LichenError, match=r"everybody on the network(.|\n)*--key-env"):
            ModelServer(model, host=host)
    with pytest.raises(LichenError, match="cannot listen"):
        ModelServer(model, host="192.0.2.1", key=key)
    with at_address(model) as server, pytest.raises(LichenError, match="cannot listen"):
        ModelServer(model, port=server.port)

    file = tmp_path / "key"
    file.write_text(key + "\n")
    file.chmod(0o644)
    with pytest.raises(LichenError, match="others may read it"):
        read_key(None, file)
    file.chmod(0o600)
    monkeypatch.setenv("OWN_KEY", key)
    monkeypatch.setenv("SHORT_KEY", "short")
    assert (read_key(None, file), read_key("OWN_KEY", None), read_key(None, None)) == (key, key, "")
    for env, path in (("OWN_KEY", file), ("NO_KEY", None), ("SHORT_KEY", None), (None, tmp_path / "none")):
        with pytest.raises(LichenError):
            read_key(env, path)


def test_large_slow_and_cut_requests(server: ModelServer, model: TransformersModel) -> None:
    huge = json.dumps({**BODY, "messages": [{"role": "user", "content": "w1 " * 3_500_000}]}).encode()
    assert len(huge) > 10_000_000
    assert refused(ask(server, CHAT, huge))[0] == 413
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
    with at_address(model, limits=Limits(arrive=0.4)) as quick:
        start = (head % quick.port).encode()
        for begun in (b"", b"POST", start, start + b"Content-Length: 9\r\n\r\n{"):
            reply = raw(quick, begun)
            assert b" 408 " in reply.split(b"\r\n")[0] if begun else reply == b""
    start = (head % server.port).encode()
    for end, status in (
        (b"\r\n", 411),
        (b"Content-Length: -1\r\n\r\n", 411),
        (b"Content-Length: 1e3\r\n\r\n", 411),
        (b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"Content-Length: 4\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", 431),
    ):
        line = raw(server, start + end).split(b"\r\n")[0]
        assert line.startswith(f"HTTP/1.1 {status} ".encode()), (end[:60], line)
    assert ask(server, CHAT, BODY)[0] == 200


def test_more_clients_than_may_be_there_are_told_so() -> None:
    with at_address(Scripted(), limits=Limits(arrive=20.0, connections=2)) as server:
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        for _ in range(100):
            status, _ = reply = ask(server, "/v1/models")
            if status == 503:
                break
        assert refused(reply) == (503, "too many requests at once: try again later")
        for one in idle:
            one.close()
        for _ in range(200):
            if ask(server, "/v1/models")[0] == 200:
                return
            time.sleep(0.02)
        pytest.fail("those who left are still counted")


def test_faults_of_the_model_are_told_without_what_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with at_address(Scripted()) as server:
        body = {"model": "tiny", "prompt": "fault"}
        assert refused(ask(server, TEXT, body)) == (500, "the server failed: ZeroDivisionError")
        assert refused(ask(server, TEXT, {**body, "prompt": "late fault"})) == (502, "it ended")
        stream = json.dumps({**body, "prompt": "late fault", "stream": True}).encode()
        reply = raw(server, posted(server, stream))
        assert b'data: {"error": {"message": "it ended"' in reply
        assert b"[DONE]" not in reply
        assert ask(server, TEXT, {**body, "prompt": "well"})[1]["choices"][0]["text"] == "one"
    assert "secret" not in "".join(capsys.readouterr())


def test_who_leaves_a_stream_ends_it() -> None:
    before = threading.active_count()
    with at_address(Scripted()) as server:
        body = json.dumps({"model": "tiny", "prompt": "wait", "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as link:
            link.sendall(posted(server, body))
            assert link.recv(4000)
            assert threading.active_count() > before + 1
        for _ in range(300):
            if threading.active_count() <= before + 1:
                return
            time.sleep(0.02)
        pytest.fail("the answer goes on")


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"model": "other"}, 404, "'tiny'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "king", "content": "w1"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "w1 " * 200}]}, 400, "more than the model's 128"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 500}, 400, "more than the model's 128"),
        ({"max_tokens": "2"}, 400, "max_tokens"),
        ({"max_tokens": True}, 400, "max_tokens"),
        ({"max_completion_tokens": 2}, 400, "give one"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"stop": [""]}, 400, "stop"),
        ({"n": 2}, 400, "n"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"tools": []}, 400, "'tools' is not known here"),
        ({"top_logprobs": 2}, 400, "needs logprobs"),
        ({"top_logprobs": 99, "logprobs": True}, 400, "top_logprobs"),
    ],
)
def test_a_wrong_field_is_named(server: ModelServer, change: dict[str, Any], status: int, word: str) -> None:
    found = refused(ask(server, CHAT, {**BODY, **change}))
    assert found[0] == status
    assert word in found[1]


def spoilt(rng: random.Random) -> bytes:
    """A body that something has gone wrong with."""
    whole = json.dumps(BODY if rng.random() < 0.5 else {"model": "tiny", "prompt": "w1 w2", "max_tokens": 2}).encode()
    kind = rng.randrange(6)
    if kind == 0:
        return whole[: rng.randrange(len(whole))]
    if kind == 1:
        at = rng.randrange(len(whole))
        return whole[:at] + rng.randbytes(rng.randrange(1, 4)) + whole[at + 1 :]
    if kind == 2:
        return rng.choice(
            [b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b'"\\ud800"', b"null", b"[]", b"\xff\xfe", b""]
        )
    body = json.loads(whole)
    odd: list[Any] = [None, [], {}, -1, 1e308, 10**30, "", "\x00", "\ud800", True, [[]], {"a": 1}, 2**63, float("inf")]
    name = rng.choice(
        [*body, "seed", "stop", "logprobs", "stream", "top_p", "echo", "stream_options", "\x00", "a" * 9999]
    )
    body[name] = rng.choice(odd)
    if kind == 4 and "messages" in body:
        body["messages"] = [{"role": rng.choice(["user", *odd]), "content": rng.choice(["w1", *odd])}]
    return json.dumps(body).encode()


def test_three_hundred_spoilt_requests(server: ModelServer, capsys: pytest.CaptureFixture[str]) -> None:
    rng, statuses = random.Random(7), []
    for _ in range(300):
        path = rng.choice([CHAT, TEXT, "/v1/embeddings", "/v1/models", "/v1/../etc/passwd", "/v1/chat/completions/"])
        data = spoilt(rng)
        whole = posted(server, data, path)
        if rng.random() < 0.1:  # the head, too
            at = rng.randrange(60)
            whole = whole[:at] + rng.randbytes(2) + whole[at:]
        reply = raw(server, whole)
        first, _, rest = reply.partition(b"\r\n\r\n")
        if not first.startswith(b"HTTP/1.1 "):  # no line came
            assert b'"error"' in reply or not reply
            continue
        status = int(first.split()[1])
        statuses.append(status)
        assert b"Traceback" not in reply
        if status != 200:
            refused((status, json.loads(rest)))
    assert len(statuses) > 270
    assert 500 not in statuses
    assert {200, 400, 404} <= set(statuses)
    assert ask(server, CHAT, BODY)[0] == 200
    assert capsys.readouterr() == ("", "")
