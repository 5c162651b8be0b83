"""What the benchmark of faults counts, and the relay and the faults that it is made of."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from faults_course import KINDS, ROUNDS, Length, exactly_once, faults_of
from faults_trial import Relay

KEY = {"site": "a", "client": 1, "version": 2, "state": "s", "digest": "d"}


def begun(pid: int, **other: Any) -> dict[str, Any]:
    return {"what": "begun", "pid": pid, **KEY, **other}


SAVED = {"what": "saved", "pid": 1, **KEY}


@pytest.mark.parametrize(
    ("notes", "again", "twice"),
    [
        ([begun(1), SAVED], 0, 0),
        ([begun(1), begun(2), SAVED], 1, 0),  # killed before it had saved
        ([begun(1), SAVED, begun(2)], 0, 1),
        ([begun(1), begun(1)], 0, 1),
        ([begun(1), begun(2), SAVED, begun(3)], 1, 1),
        ([begun(1), SAVED, *(begun(1, **{name: "other"}) for name in KEY)], 0, 0),
    ],
)
def test_what_was_saved_may_not_be_trained_again_and_what_was_not_only_after_a_kill(
    notes: list[dict[str, Any]], again: int, twice: int
) -> None:
    found = exactly_once(notes)
    assert (found["again"], found["twice"]) == (again, twice)
    assert found["trained"] == sum(note["what"] == "begun" for note in notes)
    assert found["trained"] == found["pairs"] + again + twice


@pytest.mark.parametrize("length", ["short", "chat"])
def test_the_seed_gives_the_faults_and_every_kind_comes_as_often(length: Length) -> None:
    several = [faults_of(seed, length) for seed in range(20)]
    assert several == [faults_of(seed, length) for seed in range(20)]
    counted = Counter(fault.kind for faults in several for fault in faults)
    assert counted == dict.fromkeys(KINDS, 5)
    for faults in several:
        rounds = [fault.round for fault in faults]
        assert rounds == sorted(set(rounds))
        assert rounds[0] >= 1
        assert rounds[-1] < ROUNDS[length]
        assert all(5 <= one.seconds <= 60 for one in faults if one.kind in ("cut", "refuse"))


@contextmanager
def echo() -> Iterator[Relay]:
    server = socket.create_server(("localhost", 0))

    def reply(link: socket.socket) -> None:
        with link:
            link.sendall(link.recv(9))

    def serve() -> None:
        while True:
            try:
                link, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=reply, args=(link,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    relay = Relay(server.getsockname()[1])
    try:
        yield relay
    finally:
        relay.close()
        server.close()


def ask(relay: Relay, link: socket.socket | None = None) -> bytes:
    with link or socket.create_connection(("localhost", relay.port), 5) as line:
        line.settimeout(5)
        line.sendall(b"there?")
        return line.recv(9)


def test_a_relay_passes_bytes_holds_them_back_and_hangs_up() -> None:
    with echo() as relay:
        assert ask(relay) == b"there?"
        cut = threading.Thread(target=relay.cut, args=(0.4,), kwargs={"refuse": False})
        link = socket.create_connection(("localhost", relay.port), 5)
        time.sleep(0.1)
        cut.start()
        time.sleep(0.1)
        begun_at = time.monotonic()
        assert ask(relay, link) == b"there?"
        assert time.monotonic() - begun_at > 0.1
        cut.join()
        refused = threading.Thread(target=relay.cut, args=(0.4,), kwargs={"refuse": True})
        refused.start()
        time.sleep(0.1)
        assert nothing_from(relay)
        refused.join()
        assert ask(relay) == b"there?"


def nothing_from(relay: Relay) -> bool:
    try:
        return ask(relay) == b""
    except OSError:
        return True
