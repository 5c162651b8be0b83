"""Streams of a federation over gRPC: how parcels are cut, and what becomes of a site that sends what it must not."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from free_port import free_port

from lichen.core.errors import LichenError
from lichen.engines.remote.pieces import PIECE
from lichen.engines.sites import SiteError
from lichen.federation import reach
from lichen.federation.kits.settle import Kit, open_kit
from lichen.federation.transports import server as stream_server
from lichen.federation.transports import site as stream_site
from lichen.federation.transports.credentials import PULSE, import_grpc, site_credentials, site_of
from lichen.federation.transports.messages import AT_ONCE, MESSAGE, Inbox, Outbox
from lichen.federation.transports.refusals import METHOD, SERVICE, fault_of, reason
from lichen.federation.transports.server import StreamSites
from lichen.federation.transports.site import StreamSite

pytest.importorskip("grpc")


def quiet(line: str) -> None:
    """Nobody reads it here."""


def until(what: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something to be true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def sent(parcels: dict[int, bytes]) -> list[bytes]:
    """All messages of parcels that are put at once."""
    outbox = Outbox()
    for number, body in parcels.items():
        outbox.put(number, {"number": number}, body)
    messages = outbox.messages()
    found = []
    for message in messages:
        found.append(message)
        if not outbox.waits():
            outbox.close()
    return found


@pytest.mark.parametrize("sizes", [[0], [1, 1 << 20], [PIECE, 0, 3 << 20], list(range(AT_ONCE))])
def test_what_is_cut_into_messages_is_put_together_again(sizes: list[int]) -> None:
    parcels = {number: os.urandom(size) for number, size in enumerate(sizes, 1)}
    messages = sent(parcels)
    assert max(map(len, messages)) <= MESSAGE
    inbox = Inbox(lambda number: True)
    found = [one for message in messages if (one := inbox.take(message)) is not None]
    assert {number: bytes(body) for number, _, body in found} == parcels
    assert all(head == {"number": number} for number, head, _ in found)


def test_a_short_parcel_does_not_wait_for_a_long_one() -> None:
    messages = sent({1: bytes(PIECE), 2: b"short"})
    inbox = Inbox(lambda number: True)
    ends = [number for message in messages if (one := inbox.take(message)) is not None for number in one[:1]]
    assert ends == [2, 1]
    assert inbox.take(messages[0]) is None  # the stream goes on


def test_what_is_dropped_is_not_sent_and_not_gathered() -> None:
    outbox, inbox = Outbox(), Inbox(lambda number: True)
    outbox.put(1, {}, bytes(3 << 20))
    outbox.put(2, {}, bytes(3 << 20))
    messages = outbox.messages()
    for _ in range(2):  # one of each
        assert inbox.take(next(messages)) is None
    outbox.drop(1)
    outbox.put(3, {}, b"more")
    rest = [next(messages) for _ in range(5)]
    assert [one[0] for found in map(inbox.take, rest) if found is not None for one in [found]] == [3, 2]
    assert not outbox.waits()
    with pytest.raises(LichenError, match="no beginning"):
        inbox.take(b"M" + (1).to_bytes(8, "little") + b"x")


def first(number: int, total: int, rest: bytes) -> bytes:
    return b"F" + number.to_bytes(8, "little") + total.to_bytes(4, "little") + rest


GARBAGE = {
    "nothing": b"",
    "a wrong length": bytes(MESSAGE + 1),
    "another kind": b"?" + bytes(20),
    "no total": b"F" + bytes(9),
    "too much": first(1, (1 << 31), b""),
    "more than announced": first(1, 3, b"four"),
    "no parcel": first(1, 4, b"\xff\xff\xff\xff"),
    "no JSON": first(1, 6, b"\x02\x00\x00\x00{]"),
    "nothing more": first(1, 3, b""),
}


@pytest.mark.parametrize("message", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_refused(message: bytes) -> None:
    with pytest.raises(LichenError):
        Inbox(lambda number: True).take(message)


def test_no_more_parcels_are_gathered_at_a_time_than_a_stream_may_have() -> None:
    inbox = Inbox(lambda number: True)
    for number in range(AT_ONCE + 1):
        inbox.take(first(number, 100, b"part"))
    with pytest.raises(LichenError, match="more than a stream may have"):
        inbox.take(first(AT_ONCE + 1, 100, b"part"))


def test_words_about_a_stream_do_not_pile_up() -> None:
    outbox = Outbox()
    for _ in range(100):
        outbox.say({"op": "look"})
    messages = outbox.messages()
    next(messages)
    assert not outbox.waits()


# --- a server and whoever connects -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(grpc_federation: Path) -> Iterator[StreamSites]:
    with StreamSites(grpc_federation / "server", say=quiet) as made:
        yield made


def stream(kit: Kit, messages: list[bytes]) -> tuple[str, str]:
    """What ends a stream of these messages: gRPC's status, and its details."""
    grpc = import_grpc()
    place = f"{kit.host}:{kit.port}"
    options = [("grpc.use_local_subchannel_pool", 1)]
    held = threading.Event()

    def said() -> Iterator[bytes]:
        yield from messages
        held.wait(20)

    with grpc.secure_channel(place, site_credentials(kit), options=options) as channel:
        call: Any = channel.stream_stream(f"/{SERVICE}/{METHOD}")(said())
        try:
            for _ in call:
                pass
        except grpc.RpcError:
            return call.code().name, call.details()
        finally:
            held.set()
    return "OK", ""


def greeting(**more: object) -> bytes:
    outbox = Outbox()
    outbox.put(0, {"instance": "x", "versions": {}, "federation": "trial", **more})
    return next(outbox.messages())


def answer_to(number: int) -> bytes:
    outbox = Outbox()
    outbox.put(number, {}, b"nobody asked")
    return next(outbox.messages())


BAD = {
    "garbage": [b"garbage"],
    "no greeting": [greeting(instance=1)],
    "long versions": [greeting(versions={"lichen": "1" * 1000})],
    "garbage later": [greeting(), b"M" + bytes(30)],
    "an answer to nothing": [greeting(), answer_to(7)],
}


@pytest.mark.parametrize("messages", BAD.values(), ids=BAD)
def test_a_site_that_sends_what_it_must_not_is_cut_off_with_a_reason(
    messages: list[bytes], server: StreamSites, grpc_federation: Path
) -> None:
    kit = open_kit(grpc_federation / "kits" / "b")
    status, details = stream(kit, messages)
    assert status == "ABORTED"
    fault = fault_of(kit, status, details)
    assert fault is not None
    assert fault.what.startswith("the server has cut this site off: ")
    until(lambda: "b" not in server.seen())


def test_a_message_longer_than_may_be_ends_the_stream(server: StreamSites, grpc_federation: Path) -> None:
    kit = open_kit(grpc_federation / "kits" / "b")
    assert stream(kit, [greeting(), bytes(2 * MESSAGE)])[0] in ("RESOURCE_EXHAUSTED", "OK", "CANCELLED")
    until(lambda: "b" not in server.seen())


def test_a_kit_of_another_federation_is_told_so(server: StreamSites, grpc_federation: Path) -> None:
    kit = open_kit(grpc_federation / "kits" / "b")
    fault = fault_of(kit, *stream(kit, [greeting(federation="other")]))
    assert fault is not None
    assert fault.what == "the server is of another federation"


def test_a_server_of_another_transport_is_told_apart(grpc_federation: Path) -> None:
    kit = open_kit(grpc_federation / "kits" / "b")
    fault = fault_of(kit, "UNIMPLEMENTED", "Method not found!")
    assert fault is not None
    assert "another transport" in fault.what
    assert fault_of(kit, "UNAVAILABLE", "Socket closed") is None
    assert fault_of(kit, "ABORTED", reason("")) is None


def test_a_name_is_that_of_the_certificate_and_a_site_s_alone(grpc_federation: Path) -> None:
    def proved(file: str, name: bytes) -> str | None:
        return site_of({"x509_common_name": [name], "x509_pem_cert": [(grpc_federation / file).read_bytes()]})

    assert proved("kits/a/startup/client.crt", b"a") == "a"
    assert proved("kits/a/startup/client.crt", b"b") is None
    assert proved("server/startup/server.crt", b"localhost") is None
    assert proved("authority/rootCA.pem", b"trial") is None
    assert site_of({}) is None


def test_a_site_whose_server_was_started_again_comes_back_and_is_the_same(
    grpc_federation: Path, monkeypatch: pytest.MonkeyPatch, server: StreamSites
) -> None:
    """The link of this one is lost at the server's end, as where it is started again."""
    monkeypatch.setattr(stream_site, "_FIRST_PAUSE", 0.05)
    said = list[str]()
    with StreamSite(grpc_federation / "kits" / "a", lambda kind, body: body, say=said.append) as site:
        until(lambda: "a" in server.seen())
        server.streams["a"].cancel()
        until(lambda: said == ["a: the connection with the server has ended; connects anew"])
        until(lambda: "a" in server.seen() and "a" in server.streams)
        assert server.seen()["a"].instance == site.instance
        assert server.ask("a", "echo", b"back", 10) == b"back"


def test_a_site_that_does_not_hear_its_server_connects_anew(
    grpc_federation: Path, monkeypatch: pytest.MonkeyPatch, server: StreamSites
) -> None:
    monkeypatch.setattr(stream_site, "_FIRST_PAUSE", 0.05)
    monkeypatch.setattr(stream_site, "_PATIENCE", 2)
    said = list[str]()
    with StreamSite(grpc_federation / "kits" / "a", lambda kind, body: body, say=said.append):
        until(lambda: "a" in server.seen())
        mute = server.streams["a"]
        with monkeypatch.context() as patch:
            patch.setattr(Outbox, "say", lambda self, head: None)
            until(lambda: "a: the server is unheard; connects anew" in said)
        until(lambda: server.streams.get("a") not in (None, mute))
        assert server.ask("a", "echo", b"back", 10) == b"back"


class Relay:
    """Passes bytes on between a site and its server, until it stands still and nobody is told."""

    def __init__(self, to: int) -> None:
        self.flows = threading.Event()
        self.flows.set()
        self._to = to
        self._listener = socket.create_server(("localhost", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                link, _ = self._listener.accept()
                other = socket.create_connection(("localhost", self._to))
                for pair in ((link, other), (other, link)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self.flows.wait()
                sink.sendall(data)
        sink.close()

    def close(self) -> None:
        self.flows.set()
        self._listener.close()


PULSES = {
    "by gRPC": (
        [(name, min(value, 1000)) for name, value in PULSE],
        1000.0,
        "the connection with the server has ended",
    ),
    "by silence": ([], 2.0, "the server is unheard"),
}


@pytest.mark.parametrize("how", PULSES)
def test_a_link_that_carries_nothing_any_more_is_noticed_at_both_ends(
    how: str, grpc_federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No end is told that the other one cannot be reached: they find out, and meet again when it can be."""
    pulse, patience, line = PULSES[how]
    monkeypatch.setattr(stream_site, "_FIRST_PAUSE", 0.05)
    for module in (stream_site, stream_server):
        monkeypatch.setattr(module, "PULSE", pulse)
        monkeypatch.setattr(module, "_PATIENCE", patience)
    monkeypatch.setattr(reach, "_PATIENCE", 0.5)
    folder = tmp_path / "trial"
    shutil.copytree(grpc_federation, folder, ignore=shutil.ignore_patterns("run"))
    file, port = folder / "server" / "startup" / "kit.json", free_port()
    file.write_text(json.dumps({**json.loads(file.read_text()), "port": port}))
    relay = Relay(port)
    file = folder / "kits" / "a" / "startup" / "kit.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "port": relay.port}))
    said = list[str]()
    with (
        StreamSites(folder / "server", say=quiet) as own,
        StreamSite(folder / "kits" / "a", lambda kind, body: body, say=said.append),
    ):
        until(lambda: "a" in own.seen())
        before = own.streams["a"]
        relay.flows.clear()
        with pytest.raises(SiteError) as caught:
            own.ask("a", "echo", b"lost", 20)
        assert caught.value.cause == "gone"
        until(lambda: bool(said))
        assert f"{line}; connects anew" in said[0]
        relay.flows.set()
        until(lambda: own.streams.get("a") not in (None, before))
        assert own.ask("a", "echo", b"again", 10) == b"again"
    relay.close()


def test_more_questions_than_a_stream_may_have_wait_and_all_are_answered(
    grpc_federation: Path, server: StreamSites
) -> None:
    with StreamSite(grpc_federation / "kits" / "a", lambda kind, body: body, say=quiet):
        until(lambda: "a" in server.seen())
        found = list[bytes]()

        def ask(number: int) -> None:
            found.append(server.ask("a", "echo", b"%d" % number, 30))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(3 * AT_ONCE)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert sorted(found) == sorted(b"%d" % number for number in range(3 * AT_ONCE))
    until(lambda: "a" not in server.seen())
    with pytest.raises(SiteError) as caught:
        server.ask("a", "echo", b"", 1)
    assert caught.value.cause == "gone"
