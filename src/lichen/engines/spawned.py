"""The engine of several processes: jobs and messages as bytes on pipes.

This is the seam a real federation uses: a node is a process that reads frames and writes frames,
and knows nothing of the server but the jobs it is sent. A frame is a kind (one byte), a length
(eight bytes, little endian) and that many bytes.

=====  =================================================
``J``  a job, server to node
``M``  a message, node to server
``.``  the job is done, node to server (empty)
``E``  the job failed, node to server (UTF-8 text)
=====  =================================================
"""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, BinaryIO, final

from torch import Tensor

from lichen.core.contracts import Aggregator, ClientTask
from lichen.core.errors import LichenError, traceback_text
from lichen.core.fold import serve
from lichen.core.message import Job, Message, pack_job, pack_message, unpack_job, unpack_message
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.engines.local import sorted_by_client
from lichen.transforms.codec import Chain
from lichen.transforms.downlink_cache import SnapshotCache

__all__ = ["SpawnedEngine", "read_frame", "serve_frames", "write_frame"]

MAX_FRAME = 1 << 36
"""Bytes; a longer announcement is damage, not data."""

PIECE = 1 << 20
"""Bytes read at once."""


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
    if len(head) < 9 or head[:1] not in (b"J", b"M", b".", b"E") or length > MAX_FRAME:
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
    agreed: Tree | None = None,
) -> None:
    """A node's life: do every job that comes, until the stream ends. A job it cannot do does not end it.

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
    snapshots = SnapshotCache(down, agreed)
    while (frame := read_frame(source)) is not None:
        try:
            job = snapshots.whole(unpack_job(frame[1]))
            for message in serve(job, client_tasks, store, base=base, block_size=1, device=device):
                write_frame(sink, b"M", pack_message(message))
            write_frame(sink, b".")
        except LichenError as error:
            write_frame(sink, b"E", str(error).encode())
        except OSError:
            raise
        except Exception as error:
            print(traceback_text(error), file=sys.stderr, flush=True)
            first = (str(error).splitlines() or [""])[0][:200]  # the server is not to read a row in it
            write_frame(sink, b"E", f"a fault of the node: {type(error).__name__}: {first}".encode())


@final
class _Node:
    """One spawned process and the tail of what it said on stderr."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=-1
        )
        self.tail: deque[str] = deque(maxlen=12)
        self.listener = threading.Thread(target=self._receive, daemon=True)
        self.listener.start()

    def _receive(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.tail.append(line.decode(errors="replace").rstrip())

    def ask(self, jobs: Sequence[bytes], answers: queue.SimpleQueue[bytes | LichenError | None]) -> None:
        """Send jobs one after another; put message bytes, or one error, and at last None."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            for job in jobs:
                write_frame(self.process.stdin, b"J", job)  # type: ignore[arg-type]
                messages = 0
                while True:
                    frame = read_frame(self.process.stdout)  # type: ignore[arg-type]
                    if frame is None:
                        raise BrokenPipeError
                    if frame[0] == b"M":
                        messages += 1
                        answers.put(frame[1])
                        continue
                    if frame[0] == b"E":
                        answers.put(LichenError(frame[1].decode(errors="replace"), where="node"))
                    elif frame[0] != b"." or messages != 1:
                        wrong = f"answered one job with {messages} messages and a frame {frame[0]!r}"
                        answers.put(LichenError(wrong, where="node", fix="both ends must run the same version"))
                    break
        except (OSError, LichenError):
            self.listener.join(timeout=1)
            wrong = "\n    ".join(self.tail) or "nothing"
            answers.put(LichenError(f"a node's process ended; it said last:\n    {wrong}", where="node"))
        answers.put(None)

    def close(self) -> None:
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):  # what a dead node has not read
                self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@final
class SpawnedEngine:
    """Clients spread over spawned processes; what crosses is what is counted.

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

    def run(self, job: Job) -> Iterator[Message]:
        """One message a client, as they arrive.

        Raises:
            LichenError: what a node refused, or the last words of one that ended.
        """
        if not self.nodes:
            self.nodes = [_Node(self.command) for _ in range(self.count)]
        answers: queue.SimpleQueue[bytes | LichenError | None] = queue.SimpleQueue()
        work: list[list[bytes]] = [[] for _ in self.nodes]
        for client in job.clients:
            work[client % self.count].append(pack_job(self._for(job, client)))
        self.bytes_down += sum(len(body) for jobs in work for body in jobs)
        if job.snapshot:  # until all have answered nobody knows
            self._acked.update(dict.fromkeys(job.clients, ""))
        threads = [
            threading.Thread(target=node.ask, args=(jobs, answers), daemon=True)
            for node, jobs in zip(self.nodes, work, strict=True)
        ]
        for thread in threads:
            thread.start()
        left, refused = len(threads), None
        while left:
            answer = answers.get()
            if answer is None:
                left -= 1
            elif isinstance(answer, LichenError):
                refused = refused or answer  # the others finish first, so that no frame of theirs is left over
            else:
                self.bytes_up += len(answer)
                yield unpack_message(answer)
        for thread in threads:
            thread.join()
        if refused is not None:
            raise refused
        if job.snapshot:
            self._acked.update(dict.fromkeys(job.clients, job.snapshot))

    def _for(self, job: Job, client: int) -> Job:
        """The job for one client; the view is sent whole where its node was started after it got the last one."""
        knows = job.acked.get(client)
        acked = {client: knows} if knows and knows == self._acked.get(client, self.agreed) else {}
        return replace(job, clients=(client,), acked=acked)

    def merge(self, aggregator: Aggregator, total: Any) -> Any:
        """The total: one server, one rank."""
        return total

    def join(self, client_N: Tensor, metrics: Tree) -> tuple[Tensor, Tree]:
        """The same, sorted by client."""
        return sorted_by_client(client_N, metrics)

    def close(self) -> None:
        """End the nodes."""
        for node in self.nodes:
            node.close()
        self.nodes, self._acked = [], {}

    def __enter__(self) -> SpawnedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
