"""The engine of several processes: jobs and messages as bytes on pipes.

This is the seam a real federation uses: a node is a process that reads frames and writes frames,
and knows nothing of the server but the jobs it is sent. A frame is a kind (one byte), a length
(eight bytes, little endian) and that many bytes.

=====  =================================================
``J``  a job, server to node
``M``  a message, node to server
``Q``  a question within a job, node to server
``A``  its answer, server to node
``.``  the job is done, node to server (empty)
``E``  the job failed, node to server (JSON: what, where, fix)
=====  =================================================
"""

from __future__ import annotations

import itertools
import json
import math
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, NamedTuple, final

from torch import Tensor

from lichen.core import tree as trees
from lichen.core.contracts import Aggregator, ClientTask
from lichen.core.errors import LichenError, traceback_text
from lichen.core.message import Job, pack_job, size, unpack_job, unpack_message
from lichen.core.replies import Reply
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.answer import answer_size, pack_answer
from lichen.core.wire.shared import Shared
from lichen.engines.local import sorted_by_client
from lichen.engines.node_talks import NodeTalks
from lichen.transforms.codec import Chain
from lichen.transforms.downlink_cache import SnapshotCache

__all__ = ["SpawnedEngine", "read_frame", "serve_frames", "write_frame"]

MAX_FRAME = 1 << 36
"""Bytes; a longer announcement is damage, not data."""

KINDS = (b"J", b"M", b"Q", b"A", b".", b"E")

PIECE = 1 << 20
"""Bytes read at once."""

ERROR = 1 << 14
"""Bytes of a node's error that are read."""


def write_frame(stream: BinaryIO, kind: bytes, body: bytes = b"") -> None:
    """Write one frame and flush it."""
    stream.write(kind + len(body).to_bytes(8, "little") + body)
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[bytes, bytes] | None:
    """``(kind, body)`` of the next frame; None at a clean end.

    Raises:
        LichenError: if the stream ends inside a frame or announces nonsense.
    """
    head = _read(stream, 9)
    if not head:
        return None
    length = int.from_bytes(head[1:], "little")
    if len(head) < 9 or head[:1] not in KINDS or length > MAX_FRAME:
        raise LichenError(f"{head.hex()} is not the head of a frame", where="wire", fix="both ends must run lichen")
    body = _read(stream, length)
    if len(body) < length:
        raise LichenError(f"the stream ended after {len(body)} of {length} bytes", where="wire")
    return head[:1], body


def _read(stream: BinaryIO, count: int) -> bytes:
    parts: list[bytes] = []
    # In pieces: a pipe's reader sets aside what it is asked for, and the announced length may be damage.
    while count and (part := stream.read(min(count, PIECE))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def serve_frames(
    source: BinaryIO,
    sink: BinaryIO,
    client_tasks: Mapping[str, ClientTask],
    store: ClientStore,
    *,
    base: str = "",
    device: str = "cpu",
    down: Chain | None = None,
    agreed: Shared | None = None,
) -> None:
    """A node's life: do every job that comes, until the stream ends. A job it cannot do does not end it.

    Jobs whose clients ask back lie open side by side; see :mod:`lichen.engines.node_talks`.

    Args:
        source: Where jobs come from.
        sink: Where messages go.
        client_tasks: What it can do.
        store: Private state of its clients.
        base: Digest of the frozen base it holds.
        device: Where its clients are trained.
        down: What the server codes the steps of its view with.
        agreed: Shared tensors that server and clients hold before the first job.
    """
    snapshots, talks = SnapshotCache(down, agreed), NodeTalks(client_tasks, store, base=base, device=device)
    while (frame := read_frame(source)) is not None:
        try:
            if frame[0] == b"A":
                frames = talks.answer(frame[1])
            else:
                talks.jobs += 1
                frames = talks.begin(snapshots.whole(unpack_job(frame[1])))
            for kind, body in frames:
                write_frame(sink, kind, body)
        except LichenError as error:
            write_frame(sink, b"E", _error_bytes(error))
        except OSError:
            raise
        except Exception as error:
            print(traceback_text(error), file=sys.stderr, flush=True)
            first = (str(error).splitlines() or [""])[0][:200]  # the server is not to read a row in it
            fault = LichenError(f"a fault of the node: {type(error).__name__}: {first}", where="node")
            write_frame(sink, b"E", _error_bytes(fault))


def _error_bytes(error: LichenError) -> bytes:
    return json.dumps([error.what, error.where, error.fix]).encode()


def _error_of(body: bytes) -> LichenError:
    """What a node says of itself; where it says nonsense, that."""
    try:
        what, where, fix = json.loads(body[:ERROR])
        return LichenError(str(what), where=f"node: {where}" if where else "node", fix=str(fix))
    except (ValueError, TypeError, RecursionError):
        return LichenError(f"said: {body[:ERROR].decode(errors='replace')}", where="node")


@final
@dataclass(frozen=True, slots=True)
class _Order:
    """One client's job on its way to a node."""

    number: int
    client: int
    job: Job


@final
class _Answer(NamedTuple):
    """The first message of a client to its job, and how many came."""

    first: bytes
    messages: int


@final
@dataclass(frozen=True, slots=True)
class _Followup:
    """What a client is answered, on its way to a node."""

    question: _Question
    answer: Tree | None


@final
@dataclass(frozen=True, slots=True)
class _Question:
    """What a client asks, and which job of its node's that is."""

    data: bytes
    node: _Node
    order: _Order
    talk: int


@final
class _Node:
    """One spawned process, the tail of what it said on stderr, and the thread that talks with it.

    Args:
        command: Starts it.
        arrived: Where ``(order, bytes or error)`` is put for every order.
        given_up: Numbers of jobs that nobody waits for any more.
    """

    def __init__(self, command: Sequence[str], arrived: _Arrived, given_up: set[int]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=-1
        )
        self.arrived, self.given_up = arrived, given_up
        self.orders: queue.PriorityQueue[tuple[int, int, _Order | _Followup | None]] = queue.PriorityQueue()
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

    def put(self, item: _Order | _Followup | None) -> None:
        """Answers go before orders, so that what is begun comes to its end; None is the end of the node."""
        self.orders.put((2 if item is None else int(isinstance(item, _Order)), next(self.ticks), item))

    def _talk(self) -> None:
        """One thing after another; each gets exactly one reply, whatever the process does, but for a dismissal."""
        while (item := self.orders.get()[2]) is not None:
            order = item if isinstance(item, _Order) else item.question.order
            if isinstance(item, _Order) and order.number in self.given_up:
                self.arrived.put((order, LichenError("the job was given up", where="node")))
                continue
            try:
                if self.ended:
                    raise BrokenPipeError
                reply = self._ask(item)
                if isinstance(item, _Order) or item.answer is not None:
                    self.arrived.put((order, reply))
            except (OSError, LichenError):
                self.ended = True
                if isinstance(item, _Followup) and item.answer is None:
                    continue
                self.listener.join(timeout=1)
                wrong = "\n    ".join(self.tail) or "nothing"
                ended = LichenError(f"a node's process ended; it said last:\n    {wrong}", where="node")
                self.arrived.put((order, ended))

    def _ask(self, item: _Order | _Followup) -> _Answer | _Question | LichenError:
        """The message of a job's one client, its question, or the node's error.

        Raises:
            OSError: if the process has ended.
            LichenError: if what it writes are no frames; nothing of it can be understood from then on.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if isinstance(item, _Order):
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
                return _error_of(frame[1])
            if frame[0] == b".":
                break
            if frame[0] == b"Q" and not count:
                return _Question(frame[1], self, order, talk)
            if frame[0] != b"M":
                return LichenError(f"answered with a frame {frame[0]!r}", where="node", fix=SAME)
            first, count = first or frame[1], count + 1
            if count > MOST_MESSAGES:
                raise LichenError(f"answered one job with more than {MOST_MESSAGES} messages", where="node", fix=SAME)
        return _Answer(first, count) if count else LichenError("answered a job with no message", where="node", fix=SAME)

    def close(self) -> None:
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


SAME = "both ends must run the same version"

MOST_MESSAGES = 10_000
"""To one job; a node that goes on is not listened to."""

_Arrived = queue.SimpleQueue[tuple[_Order, _Answer | _Question | LichenError]]


@final
class SpawnedEngine:
    """Clients spread over spawned processes; what crosses is what is counted.

    A node whose process has ended costs its clients the round, and is started again for the next.

    Args:
        command: Starts one node that speaks frames on stdin and stdout.
        nodes: Processes; client c lives on node c mod nodes.
        agreed: Digest of the shared tensors that every node holds when it starts; empty for none.
    """

    def __init__(self, command: Sequence[str], *, nodes: int = 1, agreed: str = "") -> None:
        self.command, self.count, self.agreed = tuple(command), nodes, agreed
        self._acked: dict[int, str] = {}  # the view that a client's node holds for it
        self.nodes: list[_Node] = []
        self.bytes_up = 0
        self.bytes_down = 0
        self._numbers = 0
        self._arrived: _Arrived = queue.SimpleQueue()
        self._waiting: dict[int, set[int]] = {}  # clients of each job whose reply has not come
        self._questions: dict[tuple[int, int], _Question] = {}  # by job and client: who waits for an answer
        self._given_up: set[int] = set()
        self._early: dict[int, list[Reply]] = {}  # replies that came while others were listened to

    def submit(self, job: Job) -> int:
        """Hand each client's job to its node."""
        self._start()
        self._numbers += 1
        for client in job.clients:
            mine = self._for(job, client)
            if job.snapshot:  # until it has answered nobody knows
                self._acked[client] = ""
            self.bytes_down += size(mine)
            self.nodes[client % self.count].put(_Order(self._numbers, client, mine))
        if job.clients:
            self._waiting[self._numbers] = set(job.clients)
        return self._numbers

    def _start(self) -> None:
        """Every node alive; one that was started again holds no client's view."""
        if not self.nodes:
            self.nodes = [_Node(self.command, self._arrived, self._given_up) for _ in range(self.count)]
        for place, node in enumerate(self.nodes):
            if node.ended or node.process.poll() is not None:
                node.close()
                self.nodes[place] = _Node(self.command, self._arrived, self._given_up)
                self._acked = {client: view for client, view in self._acked.items() if client % self.count != place}

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """One reply a client, as they arrive."""
        for number in numbers:
            while early := self._early.get(number):
                yield early.pop(0)
        while any(number in self._waiting for number in numbers):
            left = until - self.now()
            if left <= 0:
                return
            try:
                order, answer = self._arrived.get(timeout=None if left == math.inf else left)
            except queue.Empty:
                return
            replies, given_up = self._read(order, answer), order.number in self._given_up
            dismissed = order.client not in self._waiting.get(order.number, ())
            if isinstance(answer, _Question):
                if given_up or dismissed or not replies[0].question:
                    answer.node.put(_Followup(answer, None))
                else:
                    self._questions[order.number, order.client] = answer
            self._no_longer(order.number, order.client)
            if dismissed:
                continue
            if order.number in numbers:
                yield from replies
            elif not given_up:
                self._early.setdefault(order.number, []).extend(replies)

    def _no_longer(self, number: int, client: int) -> None:
        """Wait for a client's reply no longer."""
        waiting = self._waiting.get(number, set())
        waiting.discard(client)
        if not waiting:
            self._waiting.pop(number, None)
            self._given_up.discard(number)

    def answer(self, number: int, clients: Sequence[int], answer_C: Tree | None) -> None:
        """Hand each client's answer to its node."""
        for position, client in enumerate(clients):
            question = self._questions.pop((number, client), None)
            if question is None:
                if answer_C is None:
                    self._no_longer(number, client)
                continue
            self.bytes_down += answer_size(answer_C)
            if answer_C is not None:
                self._waiting.setdefault(number, set()).add(client)
                if question.node.closed:
                    gone = LichenError("its process has ended, and another has taken its place", where="node")
                    self._arrived.put((question.order, gone))
                    continue
            question.node.put(_Followup(question, None if answer_C is None else trees.take(answer_C, position)))

    def _read(self, order: _Order, answer: _Answer | _Question | LichenError) -> list[Reply]:
        """What came, read; of several messages the first counts, and that there were others is refused."""
        reply = Reply(job=order.number, clients=(order.client,))
        if isinstance(answer, LichenError):
            return [replace(reply, error=answer)]
        if isinstance(answer, _Question):
            self.bytes_up += len(answer.data)
            try:
                return [replace(reply, message=unpack_message(answer.data), question=True)]
            except LichenError as error:
                return [replace(reply, error=error, reason="bytes")]
        self.bytes_up += len(answer.first)
        if order.job.snapshot:
            self._acked[order.client] = order.job.snapshot
        try:
            out = [replace(reply, message=unpack_message(answer.first))]
        except LichenError as error:
            out = [replace(reply, error=error, reason="bytes")]
        if answer.messages > 1:
            what = LichenError(f"answered one job with {answer.messages:,} messages", where="node", fix=SAME)
            out.append(replace(reply, error=what, reason="twice"))
        return out

    def cancel(self, number: int) -> None:
        """Give a job up; what no node has begun is never done."""
        self._early.pop(number, None)
        for of, client in list(self._questions):
            if of == number:
                question = self._questions.pop((of, client))
                question.node.put(_Followup(question, None))
        if number in self._waiting:
            self._given_up.add(number)

    def now(self) -> float:
        """Seconds of this machine's steady clock."""
        return time.monotonic()

    def _for(self, job: Job, client: int) -> Job:
        """The job for one client; the view is sent whole where its node was started after it got the last one."""
        knows = job.acked.get(client)
        acked = {client: knows} if knows and knows == self._acked.get(client, self.agreed) else {}
        return replace(job, clients=(client,), acked=acked)

    def merge(self, aggregator: Aggregator, total: Any) -> Any:
        """The total: one server, one rank."""
        return total

    def join(
        self, client_N: Tensor, metrics: Tree, lines: Sequence[Sequence[str]] = ()
    ) -> tuple[Tensor, Tree, tuple[tuple[str, ...], ...]]:
        """The same, sorted by client."""
        return *sorted_by_client(client_N, metrics), tuple(tuple(line) for line in lines)

    def close(self) -> None:
        """End the nodes."""
        for node in self.nodes:
            node.close()
        self.nodes, self._acked = [], {}
        self._waiting, self._given_up, self._early, self._arrived = {}, set(), {}, queue.SimpleQueue()
        self._questions = {}

    def __enter__(self) -> SpawnedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
