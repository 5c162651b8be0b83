"""Transports under test: each brings up three sites of :mod:`support.counting_site`, and can stop and end them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import STDOUT, Popen, TimeoutExpired
from typing import Protocol

from lichen.core.children import bound_command, bound_environment
from lichen.engines.pipe_sites import PipeSites
from lichen.engines.sites import Sites
from lichen.federation.transports.choose import open_server
from support import counting_site, network_site

NAMES = ("north", "east", "south")


class Running(Protocol):
    """Sites that are up.

    Attributes:
        sites: The transport.
        folder: Where each site has its state, in a folder of its name.
        children: Whether sites end with the transport; if not, they wait for the next one.
    """

    sites: Sites
    folder: Path
    children: bool

    def pid(self, site: str) -> int:
        """A site's process."""
        ...

    def restart(self, site: str) -> None:
        """Start a site that was ended, and wait until it is seen."""
        ...

    def reopen(self) -> None:
        """Open the transport that was closed, and wait until all sites are seen."""
        ...


class Pipes:
    """Child processes."""

    children = True

    def __init__(self, folder: Path) -> None:
        script = counting_site.__file__
        self.folder = folder
        # Sites are stopped and killed by their numbers, so these are processes of their own: a word before the script
        # keeps support.warm from forking them.
        self.sites = PipeSites({name: [sys.executable, "-B", script, str(folder / name)] for name in NAMES})
        self.sites.start()

    def pid(self, site: str) -> int:
        return self.sites.children[site].process.pid

    def restart(self, site: str) -> None:
        self.sites.start()

    def reopen(self) -> None:
        self.sites.start()


class Network:
    """A federation on this machine, by either transport: each site is a process of its own."""

    children = False

    def __init__(self, folder: Path, federation: Path) -> None:
        self.folder, self.federation = folder, federation
        self.processes: dict[str, Popen[bytes]] = {}
        for name in NAMES:
            self.start(name)
        self.sites = open_server(self.federation / "server", say=self.say)
        self.wait(NAMES)

    def say(self, line: str) -> None:
        with open(self.folder / "server.txt", "a", encoding="utf-8") as log:
            log.write(f"{line}\n")

    def start(self, site: str) -> None:
        command = [sys.executable, network_site.__file__, str(self.folder / site), str(self.federation / "kits" / site)]
        with open(self.folder / f"{site}.txt", "ab") as said:
            started = Popen(bound_command(command), env=bound_environment(), stdout=said, stderr=STDOUT)
        self.processes[site] = started

    def wait(self, names: tuple[str, ...]) -> None:
        until(lambda: set(names) <= set(self.sites.seen()), 60)

    def pid(self, site: str) -> int:
        return self.processes[site].pid

    def restart(self, site: str) -> None:
        with suppress(TimeoutExpired):
            self.processes[site].wait(1)  # a killed one is missed before it has ended
            self.start(site)
        self.wait((site,))

    def reopen(self) -> None:
        self.sites = open_server(self.federation / "server", say=self.say)
        self.wait(NAMES)

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@contextmanager
def pipes(folder: Path, federation: Callable[[], Path]) -> Iterator[Running]:
    """Sites that are this process's children."""
    running = Pipes(folder)
    try:
        yield running
    finally:
        running.sites.close()


@contextmanager
def network(folder: Path, federation: Callable[[], Path]) -> Iterator[Running]:
    """Sites of a federation."""
    running = Network(folder, federation())
    try:
        yield running
    finally:
        running.end()
        running.sites.close()


TRANSPORTS = {"pipes": pipes, "network": network, "grpc": network}
"""Each by its name, from a folder, and what makes a federation's kits, to sites that are up until it is left."""

KITS = {"pipes": "federation", "network": "federation", "grpc": "grpc_federation"}
"""The fixture that makes them."""


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
