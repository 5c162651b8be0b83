"""An engine some of whose clients may leave for good while it is used: from then on a refusal comes in their place.

Who has left is looked up at every job and while replies are waited for, so that a round does not wait for them. The
jobs that go out name the others alone, as those of :mod:`lichen.engines.withdrawal.absent` do: what the others answer
has the bytes of a run in which the ones who left are absent from that job on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import final

from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.replies import Reply
from lichen.core.tree import Tree
from lichen.engines.around import ForwardingEngine
from lichen.engines.sites import WITHDRAWAL

__all__ = ["WITHDRAWN", "LeavingEngine"]

WITHDRAWN = "withdrawn"
"""The reason for which there is no answer."""

_LOOK = 1.0
"""Seconds between two looks at who has left."""


@final
class LeavingEngine(ForwardingEngine):
    """An engine around another, whose clients may leave.

    Args:
        inner: Does the work of those who are there; its numbers are not negative.
        gone: Gives who has left by now, by client, and what is said of it; who has left stays so.
        look: Called with a client whose reply is that its site has left, so that it is known from then on.
    """

    def __init__(
        self,
        inner: Engine,
        gone: Callable[[], Mapping[int, LichenError]],
        *,
        look: Callable[[int], None] = lambda client: None,
    ) -> None:
        self.inner, self._gone, self._look = inner, gone, look
        self._waiting: dict[int, set[int]] = {}  # clients of each job of whom something may come
        self._refused: dict[int, list[int]] = {}  # who left before a job was sent, until its replies are looked at
        self._left: dict[int, set[int]] = {}  # of whom a refusal was given
        self._nobody = 0  # jobs all of whose clients have left

    def submit(self, job: Job) -> int:
        """Send a job to those who are there."""
        gone = self._gone()
        here = tuple(client for client in job.clients if client not in gone)
        if len(here) == len(job.clients):
            number = self.inner.submit(job)
        elif here:
            number = self.inner.submit(replace(job, clients=here))
        else:
            self._nobody += 1
            number = -self._nobody
        self._waiting[number], self._left[number] = set(here), set()
        self._refused[number] = [client for client in job.clients if client in gone]
        return number

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """The inner engine's replies, and a refusal of each client that has left."""
        for number in numbers:
            gone = self._gone()
            while refused := self._refused.get(number):
                yield self._refusal(number, refused.pop(0), gone)
        while True:
            here = [number for number in numbers if self._waiting.get(number)]
            if not here:
                return
            step = min(until, self.now() + _LOOK)
            for reply in self.inner.replies(here, step):
                yield from self._passed(reply)
            gone = self._gone()
            for number in here:
                for client in sorted(self._waiting.get(number, set()) & gone.keys()):
                    yield self._refusal(number, client, gone)
            if self.now() < step or step == until:  # nothing more comes, or not in time
                return

    def _passed(self, reply: Reply) -> Iterator[Reply]:
        """An inner reply; a fault of a client that has left meanwhile is that it has."""
        left = self._left.get(reply.job, set())
        if reply.error is not None and reply.error.where.removeprefix("node: ") == WITHDRAWAL:
            for client in reply.clients:
                self._look(client)
        gone = self._gone() if reply.error is not None else {}
        for client in reply.clients if gone.keys() & set(reply.clients) or left & set(reply.clients) else ():
            if client in gone and client not in left:
                yield self._refusal(reply.job, client, gone)
        others = tuple(client for client in reply.clients if client not in left)
        if not others:
            return
        self._waiting.get(reply.job, set()).difference_update(others)
        yield reply if len(others) == len(reply.clients) else replace(reply, clients=others)

    def _refusal(self, number: int, client: int, gone: Mapping[int, LichenError]) -> Reply:
        self._waiting.get(number, set()).discard(client)
        self._left.setdefault(number, set()).add(client)
        return Reply(job=number, clients=(client,), error=gone[client], reason=WITHDRAWN)

    def answer(self, number: int, clients: Sequence[int], answer_C: Tree | None) -> None:
        """As the inner engine; those who are answered are waited for again."""
        if answer_C is not None:
            self._waiting.setdefault(number, set()).update(set(clients) - self._left.get(number, set()))
        self.inner.answer(number, clients, answer_C)

    def cancel(self, number: int) -> None:
        """Give a job up."""
        for known in (self._waiting, self._refused, self._left):
            known.pop(number, None)
        if number >= 0:
            self.inner.cancel(number)
