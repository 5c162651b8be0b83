"""An engine some of whose clients never answer: no job reaches them, and a refusal by name comes in their place.

The jobs that go out name the others alone, so that what they answer has the bytes of a run in which the absent ones
were there and their answers were dropped. Whoever collects replies is told at once, by the reason ``absent``, and waits
for nobody.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import final

from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.replies import Reply
from lichen.engines.around import ForwardingEngine

__all__ = ["ABSENT", "AbsentEngine", "what_absent"]

ABSENT = "absent"
"""The reason for which there is no answer."""


def what_absent(client: int) -> str:
    """What is said in the place of a client's answer."""
    return f"client {client} never took part"


@final
class AbsentEngine(ForwardingEngine):
    """An engine around another, for jobs to all its clients.

    Args:
        inner: Does the work of those who are there; its numbers are not negative.
        absent: Clients that never answer.
        first: Of several ranks one alone says who is absent, since what all of them say is joined.
    """

    def __init__(self, inner: Engine, absent: Collection[int], *, first: bool = True) -> None:
        self.inner, self.absent, self.first = inner, frozenset(absent), first
        self._gone: dict[int, tuple[int, ...]] = {}  # absent clients of a job, until it is told of them
        self._nobody = 0  # jobs of which all clients are absent

    def submit(self, job: Job) -> int:
        """Send a job to those who are there."""
        gone = tuple(client for client in job.clients if client in self.absent)
        if not gone:
            return self.inner.submit(job)
        here = tuple(client for client in job.clients if client not in self.absent)
        if here:
            number = self.inner.submit(replace(job, clients=here))
        else:
            self._nobody += 1
            number = -self._nobody
        self._gone[number] = gone
        return number

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """Who is absent, and the inner engine's replies."""
        for number in numbers:
            for client in self._gone.pop(number, ()) if self.first else ():
                error = LichenError(what_absent(client), where="federation.absent")
                yield Reply(job=number, clients=(client,), error=error, reason=ABSENT)
        if others := [number for number in numbers if number >= 0]:
            yield from self.inner.replies(others, until)

    def cancel(self, number: int) -> None:
        """Give a job up."""
        self._gone.pop(number, None)
        if number >= 0:
            self.inner.cancel(number)
