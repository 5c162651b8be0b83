"""Answers jobs of training from a history: rounds happen again without a client being asked, whole or without somebody.

An engine is transport and time, so what a recorded round would have made of fewer answers is what any algorithm makes
of an engine that brings fewer. Other jobs, such as validation, are done by the engine inside.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import final

from lichen.core.collecting.history import History
from lichen.core.contracts.engine import Engine
from lichen.core.message import Job
from lichen.core.replies import Reply
from lichen.engines.around import ForwardingEngine

__all__ = ["ReplayEngine"]


@final
class ReplayEngine(ForwardingEngine):
    """Replies to jobs of one work are those of the same round and clients in a history; who is not there is missing.

    The messages are as an aggregator takes them: what an :class:`lichen.core.collecting.admission.Admission` makes of
    one on its arrival was made of these.

    Args:
        inner: Does all other jobs; its numbers are not negative.
        history: Of rounds that waited for all they invited.
        work: The work that is answered from it.
        without: Clients whose messages are left out.
    """

    def __init__(self, inner: Engine, history: History, *, work: str, without: Collection[int] = frozenset()) -> None:
        self.inner, self.history, self.work, self.without = inner, history, work, frozenset(without)
        self._jobs: dict[int, Job] = {}

    def submit(self, job: Job) -> int:
        """Remember a job that is answered here, by a negative number; else as the inner engine."""
        if job.work != self.work:
            return self.inner.submit(job)
        number = min(self._jobs, default=0) - 1
        self._jobs[number] = job
        return number

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """The recorded messages, and the inner engine's replies.

        Raises:
            LichenError: if a file of the history is damaged.
        """
        for number in sorted(self._jobs.keys() & set(numbers), reverse=True):
            job = self._jobs[number]
            for message, _ in self.history.messages(set(job.clients) - self.without, [job.version]):
                yield Reply(job=number, clients=tuple(message.client_C.tolist()), message=message)
        if others := [number for number in numbers if number not in self._jobs]:
            yield from self.inner.replies(others, until)

    def cancel(self, number: int) -> None:
        """Forget a job; else as the inner engine."""
        if number in self._jobs:
            del self._jobs[number]
        else:
            self.inner.cancel(number)
