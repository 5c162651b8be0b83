"""Goes around any engine: looks at jobs on their way out and at replies on their way back, or changes them.

What two functions can say is an :class:`AroundEngine`; what needs more stands on :class:`ForwardingEngine`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, final

from torch import Tensor

from lichen.core.contracts.engine import Engine
from lichen.core.contracts.server import Aggregator
from lichen.core.message import Job
from lichen.core.replies import Reply
from lichen.core.tree import Tree

__all__ = ["AroundEngine", "ForwardingEngine"]


class ForwardingEngine(ABC):
    """The base of an engine around another: it forwards all but jobs and replies.

    Attributes:
        inner: Does the work, and counts bytes.
    """

    inner: Engine

    @abstractmethod
    def submit(self, job: Job) -> int:
        """Send a job out by the inner engine; the number by which its replies are known."""

    @abstractmethod
    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """Replies to these jobs, made of the inner ones."""

    @abstractmethod
    def cancel(self, number: int) -> None:
        """Give a job up, at the inner engine too."""

    @property
    def bytes_up(self) -> int:
        """The inner engine's."""
        return self.inner.bytes_up

    @property
    def bytes_down(self) -> int:
        """The inner engine's."""
        return self.inner.bytes_down

    def answer(self, number: int, clients: Sequence[int], answer_C: Tree | None) -> None:
        """As the inner engine."""
        self.inner.answer(number, clients, answer_C)

    def now(self) -> float:
        """The inner engine's clock."""
        return self.inner.now()

    def merge(self, aggregator: Aggregator, total: Any) -> Any:
        """The inner engine's."""
        return self.inner.merge(aggregator, total)

    def join(
        self, client_N: Tensor, metrics: Tree, lines: Sequence[Sequence[str]] = ()
    ) -> tuple[Tensor, Tree, tuple[tuple[str, ...], ...]]:
        """The inner engine's."""
        return self.inner.join(client_N, metrics, lines)


@final
class AroundEngine(ForwardingEngine):
    """An engine like the one inside, but for what two functions do.

    Args:
        inner: Does the work, and counts bytes.
        on_job: A job to the one that goes out.
        on_reply: A reply and the job it belongs to, to the replies that come back in its place.
    """

    def __init__(
        self,
        inner: Engine,
        *,
        on_job: Callable[[Job], Job] = lambda job: job,
        on_reply: Callable[[Reply, Job], Iterable[Reply]] = lambda reply, job: (reply,),
    ) -> None:
        self.inner, self.on_job, self.on_reply = inner, on_job, on_reply
        self._jobs: dict[int, Job] = {}

    def submit(self, job: Job) -> int:
        """Send out what ``on_job`` makes of a job."""
        job = self.on_job(job)
        number = self.inner.submit(job)
        self._jobs[number] = job
        return number

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """What ``on_reply`` makes of each reply."""
        for reply in self.inner.replies(numbers, until):
            yield from self.on_reply(reply, self._jobs[reply.job])

    def cancel(self, number: int) -> None:
        """Give a job up."""
        self._jobs.pop(number, None)
        self.inner.cancel(number)
