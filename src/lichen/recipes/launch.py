"""Starts the ranks of a run on this machine, and ends with them; says how many processes a machine can carry.

The ranks find one another through a file in a folder of their own and talk over the loopback interface
alone. The first one tells what happens as JSON lines on its standard output:

==========  ==================================================================================
``say``     a line of progress
``event``   a finished round, as a line of the trace
``error``   what the user is to mend: ``what``, ``where``, ``fix``
``fault``   a fault of lichen itself: its first line, and the traceback
==========  ==================================================================================

A rank ends with the command that started it, however that dies (:mod:`lichen.core.children`).
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, final

import torch

from lichen.core.children import bound_environment
from lichen.core.errors import LichenError, traceback_text
from lichen.core.machine import machine_fault
from lichen.engines.block_size import device_free_bytes
from lichen.engines.ranks import RENDEZVOUS, RankError, threads_for
from lichen.present.trace import Event, event_line, event_of
from lichen.present.units import bytes_text
from lichen.recipes.schema.recipe import Recipe

__all__ = ["launch", "require_processes", "telling"]

GRACE = 15.0
"""Seconds that ranks have to end by themselves once one of them has, or after Ctrl-C."""

MOST_PROCESSES, PER_CORE = 16, 4
"""Nodes or ranks of a run: so many are started on any machine, and so many for each core of a large one."""

PROCESS_BYTES = 300_000_000
"""What each holds before it has opened anything, as measured: Python, torch and transformers."""


@final
class EventSender:
    """What the first rank tells its launcher.

    Args:
        stream: Where the lines go; None for a rank that keeps silent.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream

    def send(self, kind: str, what: Any) -> None:
        """One line."""
        if self.stream is not None:
            self.stream.write(json.dumps([kind, what]) + "\n")
            self.stream.flush()

    def say(self, line: str) -> None:
        """A line of progress."""
        self.send("say", line)

    def __call__(self, event: Event) -> None:
        """A finished round."""
        self.send("event", event_line(event).decode())


def require_processes(recipe: Recipe) -> None:
    """Refuse more processes than this machine has cores and memory for.

    What the model adds to each is told by the plan, which has measured it.

    Raises:
        LichenError: naming what is too little.
    """
    count = recipe.engine.nodes
    if not (recipe.engine_kind.nodes or recipe.engine_kind.ranks):
        return
    cores = threads_for(1)
    most, free = max(MOST_PROCESSES, PER_CORE * cores), device_free_bytes(torch.device("cpu"))
    fits = free // PROCESS_BYTES
    if count > most:
        raise LichenError(
            f"{count:,} processes are too many for {cores} core{'s' * (cores > 1)}: at most {most} are started here",
            where="engine.nodes",
            fix=f"set it to {most} or fewer; one for each core is fastest",
        )
    if count > fits:
        raise LichenError(
            f"{count} processes need {bytes_text(count * PROCESS_BYTES)} of memory for Python and its libraries alone, "
            f"and {bytes_text(free)} are free",
            where="engine.nodes",
            fix=f"set it to {fits}, or end other programs" if fits else "set engine.name to local",
        )


@contextmanager
def telling() -> Iterator[EventSender]:
    """Be a launched rank: standard output belongs to the launcher.

    Whatever goes wrong inside is told and becomes the exit code.
    """
    first = os.environ.get("RANK") == "0"
    sender = EventSender(sys.stdout if first else None)
    sys.stdout = sys.stderr  # whatever prints must not come between the lines
    try:
        yield sender
    except LichenError as error:
        sender.send("error", {"what": error.what, "where": error.where, "fix": error.fix})
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if (refused := machine_fault(error)) is not None:
            sender.send("error", {"what": refused.what, "where": refused.where, "fix": refused.fix})
            raise SystemExit(2) from None
        text = f"{type(error).__name__}: {error}" if not isinstance(error, RankError) else str(error)
        sender.send("fault", {"text": text, "trace": traceback_text(error)})
        raise SystemExit(1) from None


@final
class _Rank:
    """One started process, the lines it tells and the tail of what it said on stderr."""

    def __init__(self, rank: int, command: Sequence[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**bound_environment(environment), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on once
        )
        self.tail: deque[str] = deque(maxlen=12)
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.readers = [threading.Thread(target=self._read_lines, args=(self.process.stderr, self.tail.append))]
        if rank == 0:
            self.readers.append(threading.Thread(target=self._read_lines, args=(self.process.stdout, self.lines.put)))
        for reader in self.readers:
            reader.daemon = True
            reader.start()

    @staticmethod
    def _read_lines(stream: TextIO, put: Callable[[str], None]) -> None:
        for line in stream:
            put(line.rstrip("\n"))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for reader in self.readers:
            reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


def launch(
    command: Sequence[str], *, nodes: int, observers: Sequence[Callable[[Event], None]], say: Callable[[str], None]
) -> None:
    """Run ``command`` as so many ranks on this machine, to the end of all of them.

    Args:
        command: Starts one rank; it tells as above.
        nodes: How many.
        observers: Called with every finished round.
        say: Called with lines of progress.

    Raises:
        LichenError: what a rank refused, or that one was ended.
        RankError: a fault of lichen itself in a rank.
        KeyboardInterrupt: after Ctrl-C, when all ranks have stopped.
    """
    with tempfile.TemporaryDirectory(prefix="lichen-ranks-") as folder:
        environment = {
            **os.environ,
            "WORLD_SIZE": str(nodes),
            "LOCAL_WORLD_SIZE": str(nodes),
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
            RENDEZVOUS: (Path(folder) / "meet").as_uri(),
        }
        environment.setdefault("OMP_NUM_THREADS", str(threads_for(nodes)))
        ranks: list[_Rank] = []
        try:
            for rank in range(nodes):
                ranks.append(_Rank(rank, command, environment))
            _follow(ranks, observers, say)
        except KeyboardInterrupt:
            for started in ranks:
                if started.process.poll() is None:
                    started.process.send_signal(signal.SIGINT)
            until = time.monotonic() + GRACE
            with suppress(KeyboardInterrupt, subprocess.TimeoutExpired):  # a second Ctrl-C does not wait
                for started in ranks:
                    started.process.wait(timeout=max(0.0, until - time.monotonic()))
            raise
        finally:
            for started in ranks:
                started.close()


def _follow(ranks: Sequence[_Rank], observers: Sequence[Callable[[Event], None]], say: Callable[[str], None]) -> None:
    """Pass on what the first rank tells, until all have ended; raise what went wrong."""
    wrong: list[Exception] = []

    def handle(line: str) -> None:
        kind, what = json.loads(line)
        if kind == "say":
            say(what)
        elif kind == "event":
            for observe in observers:
                observe(event_of(what.encode()))
        elif kind == "error":
            wrong.append(LichenError(what["what"], where=what["where"], fix=what["fix"]))
        else:
            fault = RankError(what["text"])
            fault.add_note(what["trace"])
            wrong.append(fault)

    until = float("inf")
    while None in (ended := [started.process.poll() for started in ranks]) and time.monotonic() < until:
        with suppress(queue.Empty):
            handle(ranks[0].lines.get(timeout=0.1))
        if until == float("inf") and any(ended):
            until = time.monotonic() + GRACE
    for started in ranks:
        started.close()
    with suppress(queue.Empty):
        while True:
            handle(ranks[0].lines.get_nowait())
    killed = [(rank, -code) for rank, code in enumerate(ended) if code is not None and code < 0]
    if killed:
        rank, number = killed[0]
        raise LichenError(
            f"rank {rank} was ended by signal {number}",
            where="engine.nodes",
            fix="if memory ran out (signal 9), use fewer nodes or a smaller engine.clients_per_block; "
            "then go on with --resume",
        )
    if wrong:
        raise wrong[0]
    for rank, code in enumerate(ended):
        if code == 130:
            raise KeyboardInterrupt
        if code:  # None is one that had not ended, and was made to
            last_lines = "\n    ".join(ranks[rank].tail) or "nothing"
            raise LichenError(f"rank {rank} ended with {code}; it said last:\n    {last_lines}", where="engine.nodes")
