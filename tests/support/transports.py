"""Transports under test: each brings up three sites of :mod:`support.counting_site`, and can stop and end them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from lichen.engines.pipe_sites import PipeSites
from lichen.engines.sites import Sites
from support import counting_site

NAMES = ("north", "east", "south")


class Running(Protocol):
    """Sites that are up.

    Attributes:
        sites: The transport.
        folder: Where each site has its state, in a folder of its name.
    """

    sites: Sites
    folder: Path

    def pid(self, site: str) -> int:
        """A site's process."""
        ...

    def restart(self, site: str) -> None:
        """Start a site that was ended, and wait until it is seen."""
        ...


class Pipes:
    """Child processes."""

    def __init__(self, folder: Path) -> None:
        script = counting_site.__file__
        self.folder = folder
        self.sites = PipeSites({name: [sys.executable, script, str(folder / name)] for name in NAMES})
        self.sites.start()

    def pid(self, site: str) -> int:
        return self.sites.children[site].process.pid

    def restart(self, site: str) -> None:
        self.sites.start()


@contextmanager
def pipes(folder: Path) -> Iterator[Running]:
    running = Pipes(folder)
    try:
        yield running
    finally:
        running.sites.close()


TRANSPORTS = {"pipes": pipes}
"""Each by its name, from a folder to sites that are up until it is left."""


def end(running: Running, site: str) -> None:
    """Kill a site, and wait until it is seen no more."""
    os.kill(running.pid(site), signal.SIGKILL)
    until(lambda: site not in running.sites.seen())


def healthy(running: Running) -> None:
    """Let all sites go on, and start those that have ended."""
    for name in NAMES:
        if name in running.sites.seen():
            with suppress(ProcessLookupError):
                os.kill(running.pid(name), signal.SIGCONT)
        else:
            running.restart(name)


def until(holds: object, seconds: float = 30.0) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it does not come to hold"
        time.sleep(0.01)
