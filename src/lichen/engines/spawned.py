"""The engine of several processes: jobs and messages as bytes on pipes.

This is the seam a real federation uses: a node (:mod:`lichen.engines.node`) is a process that reads frames and writes
frames (:mod:`lichen.core.wire.frames`), and knows nothing of the server but the jobs it is sent.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, final

from torch import Tensor

from lichen.core import tree as trees
from lichen.core.contracts.server import Aggregator
from lichen.core.errors import LichenError
from lichen.core.message import Job, size, unpack_message
from lichen.core.replies import Reply
from lichen.core.tree import Tree
from lichen.core.wire.answer import answer_size
from lichen.engines.local import sorted_by_client
from lichen.engines.node_process import SAME, Answered, Arrived, Followup, NodeProcess, Order, Question

__all__ = ["SpawnedEngine"]


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
        self.nodes: list[NodeProcess] = []
        self.bytes_up = 0
        self.bytes_down = 0
        self._numbers = 0
        self._arrived: Arrived = queue.SimpleQueue()
        self._waiting: dict[int, set[int]] = {}  # clients of each job whose reply has not come
        self._questions: dict[tuple[int, int], Question] = {}  # by job and client: who waits for an answer
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
            self.nodes[client % self.count].put(Order(self._numbers, client, mine))
        if job.clients:
            self._waiting[self._numbers] = set(job.clients)
        return self._numbers

    def _start(self) -> None:
        """Every node alive; one that was started again holds no client's view."""
        if not self.nodes:
            self.nodes = [NodeProcess(self.command, self._arrived, self._given_up) for _ in range(self.count)]
        for place, node in enumerate(self.nodes):
            if node.ended or node.process.poll() is not None:
                node.close()
                self.nodes[place] = NodeProcess(self.command, self._arrived, self._given_up)
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
            if isinstance(answer, Question):
                if given_up or dismissed or not replies[0].question:
                    answer.node.put(Followup(answer, None))
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
            question.node.put(Followup(question, None if answer_C is None else trees.take(answer_C, position)))

    def _read(self, order: Order, answer: Answered | Question | LichenError) -> list[Reply]:
        """What came, read; of several messages the first counts, and that there were others is refused."""
        reply = Reply(job=order.number, clients=(order.client,))
        if isinstance(answer, LichenError):
            return [replace(reply, error=answer)]
        if isinstance(answer, Question):
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
                question.node.put(Followup(question, None))
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
