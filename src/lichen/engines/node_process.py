"""The server's end of one spawned node: its process, and the thread that talks with it over pipes."""

from __future__ import annotations

import itertools
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, final

from lichen.core.children import bound_environment
from lichen.core.errors import LichenError
from lichen.core.message import Job, pack_job
from lichen.core.tree import Tree
from lichen.core.wire.answer import pack_answer
from lichen.core.wire.frames import read_frame, unpack_error, write_frame

__all__ = ["SAME", "Answered", "Arrived", "Followup", "NodeProcess", "Order", "Question"]

SAME = "both ends must run the same version"

MOST_MESSAGES = 10_000
"""To one job; a node that goes on is not listened to."""


@final
@dataclass(frozen=True, slots=True)
class Order:
    """One client's job on its way to a node."""

    number: int
    client: int
    job: Job


@final
class Answered(NamedTuple):
    """The first message of a client to its job, and how many came."""

    first: bytes
    messages: int


@final
@dataclass(frozen=True, slots=True)
class Followup:
    """What a client is answered, on its way to a node."""

    question: Question
    answer: Tree | None


@final
@dataclass(frozen=True, slots=True)
class Question:
    """What a client asks, and which job of its node's that is."""

    data: bytes
    node: NodeProcess
    order: Order
    talk: int


Arrived = queue.SimpleQueue[tuple[Order, Answered | Question | LichenError]]
"""What has come of each order."""


@final
class NodeProcess:
    """One spawned process, the tail of what it said on stderr, and the thread that talks with it.

    Args:
        command: Starts it.
        arrived: Where ``(order, bytes or error)`` is put for every order.
        given_up: Numbers of jobs that nobody waits for any more.
    """

    def __init__(self, command: Sequence[str], arrived: Arrived, given_up: set[int]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=-1,
            env=bound_environment(),
        )
        self.arrived, self.given_up = arrived, given_up
        self.orders: queue.PriorityQueue[tuple[int, int, Order | Followup | None]] = queue.PriorityQueue()
        self.ticks = itertools.count()
        self.jobs = 0
        self.ended, self.closed = False, False
        self.tail: deque[str] = deque(maxlen=12)
        self.listener = threading.Thread(target=self._receive, daemon=True)
        self.talker = threading.Thread(target=self._talk, daemon=True)
        self.listener.start()
        self.talker.start()

    def _receive(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.tail.append(line.decode(errors="replace").rstrip())

    def put(self, item: Order | Followup | None) -> None:
        """Answers go before orders, so that what is begun comes to its end; None is the end of the node."""
        self.orders.put((2 if item is None else int(isinstance(item, Order)), next(self.ticks), item))

    def _talk(self) -> None:
        """One thing after another; each gets exactly one reply, whatever the process does, but for a dismissal."""
        while (item := self.orders.get()[2]) is not None:
            order = item if isinstance(item, Order) else item.question.order
            if isinstance(item, Order) and order.number in self.given_up:
                self.arrived.put((order, LichenError("the job was given up", where="node")))
                continue
            try:
                if self.ended:
                    raise BrokenPipeError
                reply = self._ask(item)
                if isinstance(item, Order) or item.answer is not None:
                    self.arrived.put((order, reply))
            except (OSError, LichenError):
                self.ended = True
                if isinstance(item, Followup) and item.answer is None:
                    continue
                self.listener.join(timeout=1)
                wrong = "\n    ".join(self.tail) or "nothing"
                ended = LichenError(f"a node's process ended; it said last:\n    {wrong}", where="node")
                self.arrived.put((order, ended))

    def _ask(self, item: Order | Followup) -> Answered | Question | LichenError:
        """The message of a job's one client, its question, or the node's error.

        Raises:
            OSError: if the process has ended.
            LichenError: if what it writes are no frames; nothing of it can be understood from then on.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if isinstance(item, Order):
            self.jobs += 1
            order, talk, kind, body = item, self.jobs, b"J", pack_job(item.job)
        else:
            order, talk, kind = item.question.order, item.question.talk, b"A"
            body = pack_answer(talk, item.answer)
        write_frame(self.process.stdin, kind, body)  # type: ignore[arg-type]
        first, count = b"", 0
        while True:
            frame = read_frame(self.process.stdout)  # type: ignore[arg-type]
            if frame is None:
                raise BrokenPipeError
            if frame[0] == b"E":
                return unpack_error(frame[1])
            if frame[0] == b".":
                break
            if frame[0] == b"Q" and not count:
                return Question(frame[1], self, order, talk)
            if frame[0] != b"M":
                return LichenError(f"answered with a frame {frame[0]!r}", where="node", fix=SAME)
            first, count = first or frame[1], count + 1
            if count > MOST_MESSAGES:
                raise LichenError(f"answered one job with more than {MOST_MESSAGES} messages", where="node", fix=SAME)
        if not count:
            return LichenError("answered a job with no message", where="node", fix=SAME)
        return Answered(first, count)

    def close(self) -> None:
        """End the process, by force if it does not end by itself."""
        self.closed = True
        self.put(None)
        if self.process.stdin is not None:
            with suppress(BrokenPipeError, ValueError):  # what a dead node has not read
                self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
