"""The engine of one process: clients side by side over one copy of the foundation model."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, final

from torch import Tensor

from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.server import Aggregator
from lichen.core.errors import LichenError
from lichen.core.fold import ClientsPerBlock, Served, answer
from lichen.core.message import Job, Message, size, sizes, take_client
from lichen.core.replies import Reply
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.answer import answer_size
from lichen.engines.conversation import Conversation, asks_back

__all__ = ["LocalEngine", "bytes_of", "sorted_by_client"]


def sorted_by_client(client_N: Tensor, metrics: Tree) -> tuple[Tensor, Tree]:
    """Both in the clients' order, whatever order they arrived in."""
    order = client_N.argsort()
    return client_N[order], {name: x[order] for name, x in metrics.items()}


@final
class LocalEngine:
    """Runs jobs here, and counts the bytes that each client would have sent and received.

    Args:
        client_tasks: What can be asked, by the job's ``work``.
        store: The clients' private state.
        base: Digest of the frozen base model.
        block_size: Clients side by side, or what finds it for a job.
        device: Where they are trained.
        raises: A client that cannot do its job ends the run, as all of them are the caller's own; else it is a reply,
            as what has a word for its reason always is.

    Raises:
        LichenError: while replies are listened to, with ``raises``.
    """

    def __init__(
        self,
        client_tasks: Mapping[str, ClientTask],
        store: ClientStore,
        *,
        base: str = "",
        block_size: int | ClientsPerBlock = 8,
        device: str = "cpu",
        raises: bool = True,
    ) -> None:
        self.client_tasks, self.store, self.base = client_tasks, store, base
        self.block_size, self.device, self.raises = block_size, device, raises
        self.bytes_up = 0
        self.bytes_down = 0
        self._numbers = 0
        self._running: dict[int, Iterator[Served] | Conversation] = {}

    def submit(self, job: Job) -> int:
        """Take a job; it is begun when somebody listens."""
        self._numbers += 1
        if job.clients:
            self.bytes_down += sizes(job)
            self._running[self._numbers] = self._serve(self._numbers, job)
        return self._numbers

    def _serve(self, number: int, job: Job) -> Iterator[Served] | Conversation:
        base, size, device = self.base, self.block_size, self.device
        if asks_back(job, self.client_tasks):
            return Conversation(number, job, self.client_tasks, self.store, base=base, block_size=size, device=device)
        return answer(job, self.client_tasks, self.store, base=base, block_size=size, device=device)

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """One reply a block, job after job, in a stable order."""
        waiting = [number for number in self._running if number in numbers]
        while waiting and self.now() < until:
            number = waiting[0]
            running = self._running.get(number)
            reply = running.next() if isinstance(running, Conversation) else _next_reply(number, running)
            if reply is None:
                waiting.pop(0)
                if not isinstance(running, Conversation) or running.ended:
                    self._running.pop(number, None)
                continue
            if reply.error is not None and self.raises and not reply.error.reason:
                raise reply.error
            if reply.message is not None:
                self.bytes_up += bytes_of(reply.message)
            yield reply

    def answer(self, number: int, clients: Sequence[int], answer_C: Tree | None) -> None:
        """Answer what clients have asked; they go on when somebody listens."""
        running = self._running.get(number)
        if isinstance(running, Conversation):
            self.bytes_down += running.answer(clients, answer_C) * answer_size(answer_C)

    def cancel(self, number: int) -> None:
        """Give a job up; what was not begun is never done."""
        self._running.pop(number, None)

    def now(self) -> float:
        """Seconds of this machine's steady clock."""
        return time.monotonic()

    def merge(self, aggregator: Aggregator, total: Any) -> Any:
        """The total: there is one rank."""
        return total

    def join(
        self, client_N: Tensor, metrics: Tree, lines: Sequence[Sequence[str]] = ()
    ) -> tuple[Tensor, Tree, tuple[tuple[str, ...], ...]]:
        """The same, sorted by client."""
        return *sorted_by_client(client_N, metrics), tuple(tuple(line) for line in lines)


def _next_reply(number: int, running: Iterator[Served] | None) -> Reply | None:
    """What the next block gives; None at the end."""
    served = None if running is None else next(running, None)
    if served is None:
        return None
    clients, what = served
    if isinstance(what, LichenError):
        return Reply(job=number, clients=clients, error=what)
    return Reply(job=number, clients=clients, message=what)


def bytes_of(message: Message) -> int:
    """Bytes that all clients of a message send."""
    clients = message.client_C.shape[0]
    if message.texts:
        return sum(size(take_client(message, c)) for c in range(clients))
    return size(message) * clients
