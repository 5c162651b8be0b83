"""A port of this machine for a server, also for tests."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """One that no connection is given by chance: those begin higher."""
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("", port := random.randrange(10_000, 32_000)))
            except OSError:
                continue
            return port
