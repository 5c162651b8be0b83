"""Sites that are this process's children, asked over pipes.

A question is a frame ``?``: its number, its kind and its body; the answer a frame ``!`` with that number, which may
come in any order. A child that writes an error by itself, or no frames, or ends, is gone until it is started again; the
last of what it wrote on stderr is told. Nothing here needs torch.
"""

from __future__ import annotations

import itertools
import os
import queue
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import BinaryIO, final

from lichen.core.children import bound_environment
from lichen.core.errors import LichenError
from lichen.core.wire.frames import read_frame, unpack_error, write_frame
from lichen.engines.sites import Cause, Seen, SiteError

__all__ = ["FAILED", "OK", "REFUSED", "Child", "PipeSites"]

OK, REFUSED, FAILED = b"o", b"r", b"f"
"""How a site answers: what was asked for; an error because it declined, or because it met a fault."""

_LAST_WORDS = 12
"""Lines of a child's stderr that are told."""

_PATIENCE = 10.0
"""Seconds that a child has to end by itself."""


@final
@dataclass(slots=True, eq=False)
class _Ask:
    """A question on its way."""

    number: int
    body: bytes
    done: threading.Event = field(default_factory=threading.Event)
    answer: bytes = b""
    error: tuple[Cause, LichenError] | None = None


@final
class Child:
    """One child process, and the threads that write to it and read from it.

    Args:
        command: Starts it.

    Attributes:
        process: The process.
        instance: Another one for each start.
        since: When it was started.
        last: When it answered last.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=-1,
            env=bound_environment(),
        )
        self.instance, self.since = os.urandom(8).hex(), time.time()
        self.last = self.since
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._open: dict[int, _Ask] = {}
        self._out: queue.SimpleQueue[_Ask | None] = queue.SimpleQueue()
        self._ended: tuple[Cause, LichenError] | None = None
        self._tail: deque[str] = deque(maxlen=_LAST_WORDS)
        self._listener = threading.Thread(target=self._receive, daemon=True)
        self._writer = threading.Thread(target=self._write, daemon=True)
        for thread in (self._listener, self._writer, threading.Thread(target=self._read, daemon=True)):
            thread.start()

    @property
    def ended(self) -> bool:
        """Whether nothing will come of it any more."""
        return self._ended is not None or self.process.poll() is not None

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        """As :meth:`lichen.engines.sites.Sites.ask`."""
        word = kind.encode()
        with self._lock:
            number = next(self._numbers)
            head = number.to_bytes(8, "little") + len(word).to_bytes(1, "little") + word
            one = _Ask(number, head + body)
            one.error = self._ended
            if one.error is None:
                self._open[number] = one
                self._out.put(one)
        if one.error is None:
            answered = one.done.wait(min(within, threading.TIMEOUT_MAX))
            with self._lock:
                self._open.pop(number, None)
            if not answered and not one.done.is_set():
                what = LichenError(f"said nothing for {within:g} s", where=f"site {site}")
                raise SiteError(site, "silent", what)
        if one.error is not None:
            raise SiteError(site, *one.error)
        return one.answer

    def _receive(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._tail.append(line.decode(errors="replace").rstrip())

    def _write(self) -> None:
        while (one := self._out.get()) is not None:
            if one.number not in self._open:  # nobody waits for it any more
                continue
            try:
                write_frame(_pipe(self.process.stdin), b"?", one.body)
            except (OSError, ValueError):
                return self._end()

    def _read(self) -> None:
        while True:
            try:
                frame = read_frame(_pipe(self.process.stdout))
            except (OSError, ValueError, LichenError):
                return self._end()
            if frame is not None and frame[0] == b"E":
                return self._end(unpack_error(frame[1]))
            if frame is None or frame[0] != b"!" or len(frame[1]) < 9:
                return self._end()
            self.last = time.time()
            self._answered(frame[1])

    def _answered(self, data: bytes) -> None:
        with self._lock:
            one = self._open.pop(int.from_bytes(data[:8], "little"), None)
        if one is not None:
            if data[8:9] == OK:
                one.answer = data[9:]
            else:
                one.error = "refused" if data[8:9] == REFUSED else "failed", unpack_error(data[9:])
            one.done.set()

    def _end(self, last: LichenError | None = None) -> None:
        """It is gone, or has said why it will be."""
        if last is None:
            self._listener.join(timeout=1)
            words = "\n    ".join(self._tail) or "nothing"
            last = LichenError(f"a node's process ended; it said last:\n    {words}", where="node")
        with self._lock:
            if self._ended is None:
                self._ended = "gone", last
            left, self._open = self._open, {}
        for one in left.values():
            one.error = self._ended
            one.done.set()

    def close(self) -> None:
        """End the process, by force if it does not end by itself."""
        self._out.put(None)
        self._writer.join(timeout=_PATIENCE)
        if self._writer.is_alive():  # it does not read, and nobody can close a pipe that is written to
            self.process.kill()
            self._writer.join()
        with suppress(OSError, ValueError):  # what a dead child has not read
            _pipe(self.process.stdin).close()
        try:
            self.process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._end()


def _pipe(stream: object) -> BinaryIO:
    return stream  # type: ignore[return-value]


@final
class PipeSites:
    """:class:`lichen.engines.sites.Sites` over child processes.

    Args:
        commands: What starts each site's process, by the site's name.

    Attributes:
        children: Those that were started and not closed, by name.
    """

    def __init__(self, commands: Mapping[str, Sequence[str]]) -> None:
        self.commands = dict(commands)
        self.children: dict[str, Child] = {}

    def start(self) -> None:
        """Start every site that is not there; from the thread that lives as long as the children are to live."""
        for name, command in self.commands.items():
            child = self.children.get(name)
            if child is None or child.ended:
                if child is not None:
                    child.close()
                self.children[name] = Child(command)

    def seen(self) -> dict[str, Seen]:
        """Who is there now."""
        here = {"lichen": version("lichen")}
        return {
            name: Seen(since=child.since, last=child.last, instance=child.instance, versions=here)
            for name, child in self.children.items()
            if not child.ended
        }

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        """Ask a site; see :meth:`lichen.engines.sites.Sites.ask`."""
        child = self.children.get(site)
        if child is None:
            raise SiteError(site, "gone", LichenError("was not started, or was ended", where=f"site {site}"))
        return child.ask(site, kind, body, within)

    def close(self) -> None:
        """End the children."""
        children, self.children = self.children, {}
        for child in children.values():
            child.close()
