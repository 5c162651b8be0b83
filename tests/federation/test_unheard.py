"""A site that does not hear its server any more connects anew, and is the same site."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lichen.federation import network, processes
from lichen.federation.network import NetworkSites, SiteEnd

pytest.importorskip("nvflare")


def until(what: Callable[[], bool], seconds: float = 90.0) -> None:
    """Wait for something to be true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def test_a_site_connects_anew_where_the_server_stands_still(federation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_PATIENCE", 8)
    monkeypatch.setattr(processes, "_AGAIN", 0.2)
    said = list[str]()
    with (
        NetworkSites(federation / "server", say=said.append) as server,
        SiteEnd(federation / "kits" / "a", lambda kind, body: body[::-1], say=said.append) as site,
    ):
        until(lambda: "a" in server.seen())
        first, its = site.parent.process, server.parent.process
        assert first is not None
        assert its is not None
        os.kill(its.pid, signal.SIGSTOP)
        try:
            until(lambda: first.poll() is not None)
        finally:
            os.kill(its.pid, signal.SIGCONT)
        until(lambda: site.parent.process is not first and "a" in server.seen())
        assert server.seen()["a"].instance == site.instance
        assert server.ask("a", "turn", b"abc", 20) == b"cba"
    assert "a: the server is unheard; connects anew" in said
