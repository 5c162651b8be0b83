"""Virtual time around any engine: clients answer late, by day only, or never, and nobody sleeps.

The inner engine does a job's work in blocks as ever; each client's answer is held until it arrives on this clock. When
that is follows from the seed, the client and the job's version alone, so that a run has the same order of arrivals
every time, on any machine, and after a resume.

An answer takes a lognormal time: its logarithm is normal around that of the median, with deviation ``sigma``. That
is the usual shape of how long phones take, where few are very late; a part of the deviation may stay with a client for
good, so that some are always slow.

References:
    Dzmitry Huba, John Nguyen, Kshitiz Malik et al. "PAPAYA: Practical, Private, and Scalable Federated Learning."
    MLSys 2022. https://arxiv.org/abs/2111.04877 (how long clients take, and what stragglers cost)
    Keith Bonawitz et al. "Towards Federated Learning at Scale: System Design." MLSys 2019.
    https://arxiv.org/abs/1902.01046 (availability by day and night; devices that drop out)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor

from lichen.core.collecting.admission import rows_of
from lichen.core.contracts.engine import Engine
from lichen.core.contracts.server import Aggregator
from lichen.core.errors import LichenError
from lichen.core.message import Job, sizes
from lichen.core.replies import Reply
from lichen.core.seeds import numpy_generator
from lichen.core.tree import Tree
from lichen.engines.local import bytes_of

__all__ = ["ClockEngine", "Delays"]

HOUR, DAY = 3600.0, 24 * 3600.0

_Pending = tuple[float, int, int, int, Reply]
"""A reply that waits: when it arrives, its job, its client, and its place among that job's."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Delays:
    """How long clients take.

    Attributes:
        median: Seconds from a job's sending to its answer, of the client in the middle; 0: all answer at once.
        sigma: Deviation of the logarithm of these seconds.
        persistence: Share of that deviation's square that stays with a client for good; the rest is new with each job.
        dropout: Chance that a client never answers a job.
        hours: Hours of a day in which a client is there; it begins no job in the others. When its day begins is drawn.

    Raises:
        LichenError: if a number is out of its range.
    """

    median: float = 60.0
    sigma: float = 1.0
    persistence: float = 0.0
    dropout: float = 0.0
    hours: float = 24.0

    def __post_init__(self) -> None:
        ranges = {
            "median": 0 <= self.median < math.inf,
            "sigma": 0 <= self.sigma <= 10,
            "persistence": 0 <= self.persistence <= 1,
            "dropout": 0 <= self.dropout <= 1,
            "hours": 0 < self.hours <= 24,
        }
        for name, holds in ranges.items():
            if not holds:
                raise LichenError(f"{getattr(self, name)} is out of range", where=f"clock.{name}", fix="see the guide")

    def arrival(self, seed: int, client: int, version: int, sent: float) -> float:
        """When a client's answer arrives; never is infinity."""
        now = numpy_generator(seed, "clock", client, version)
        always = numpy_generator(seed, "clock", client)
        fresh, fate, own, dawn = now.standard_normal(), now.random(), always.standard_normal(), always.random()
        if fate < self.dropout:
            return math.inf
        normal = math.sqrt(self.persistence) * own + math.sqrt(1 - self.persistence) * fresh
        into_day = (sent - DAY * dawn) % DAY  # since this client's day began
        begins = sent if into_day < HOUR * self.hours else sent + DAY - into_day
        return float(begins + self.median * math.exp(self.sigma * normal))


@final
class ClockEngine:
    """An engine whose clients answer when the clock says.

    A client that never answers does no work, and is sent its job all the same. ``replies`` ends early where all who
    are left are such: then nothing more will come.

    Args:
        inner: Does the work. Replies of several clients are taken apart.
        delays: How long clients take.
        seed: Of all draws.
        timed: Which jobs take time; the others are answered at once. Validation is no part of how long training takes.
    """

    def __init__(
        self, inner: Engine, delays: Delays, *, seed: int = 0, timed: Callable[[Job], bool] = lambda job: True
    ) -> None:
        self.inner, self.delays, self.seed, self.timed = inner, delays, seed, timed
        self.bytes_up = 0
        self._lost = 0  # bytes down to clients that never answer
        self._time = 0.0
        self._untimed: set[int] = set()
        self._arrivals: dict[int, dict[int, float]] = {}  # of jobs whose work has not been done
        self._pending: dict[int, list[_Pending]] = {}  # heaps, the next to arrive first
        self._dropped: dict[int, int] = {}  # clients of a job that never answer

    @property
    def bytes_down(self) -> int:
        """Bytes from server to clients so far."""
        return self.inner.bytes_down + self._lost

    def submit(self, job: Job) -> int:
        """Send a job out; when each of its clients will answer is settled now."""
        if not self.timed(job):
            number = self.inner.submit(job)
            self._untimed.add(number)
            return number
        arrivals = {c: self.delays.arrival(self.seed, c, job.version, self._time) for c in job.clients}
        some = tuple(client for client in job.clients if arrivals[client] < math.inf)
        self._lost += sizes(replace(job, clients=tuple(client for client in job.clients if client not in some)))
        number = self.inner.submit(replace(job, clients=some))
        self._arrivals[number] = arrivals
        return number

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """One reply a client, in the order of arrival; the clock goes along, and ends at ``until`` where some are late.

        Untimed jobs are answered first, block by block.
        """
        if instant := self._untimed & set(numbers):
            yield from self._counted(self.inner.replies(instant))
        for number in numbers:
            self._work(number)
        timed = [number for number in numbers if number in self._pending]
        while heaps := [self._pending[number] for number in timed if self._pending.get(number)]:
            heap = min(heaps, key=lambda waiting: waiting[0][:4])
            arrival = heap[0][0]
            if arrival > until:
                break
            self._time = max(self._time, arrival)
            yield from self._counted((heapq.heappop(heap)[-1],))
        if until < math.inf and any(self._late(number) for number in timed):
            self._time = max(self._time, until)

    def _work(self, number: int) -> None:
        """Let the inner engine do a job, once, and hold each client's answer."""
        if number not in self._arrivals:
            return
        arrivals = self._arrivals.pop(number)
        heap = list[_Pending]()
        for reply in self.inner.replies((number,)):
            for one in _by_client(reply):
                client = min(one.clients, default=-1)
                heapq.heappush(heap, (arrivals.get(client, self._time), number, client, len(heap), one))
        self._pending[number] = heap
        self._dropped[number] = sum(arrival == math.inf for arrival in arrivals.values())

    def _late(self, number: int) -> bool:
        """Whether somebody has not answered a job that was worked on."""
        return bool(self._pending[number]) or self._dropped[number] > 0

    def _counted(self, replies: Iterable[Reply]) -> Iterator[Reply]:
        for reply in replies:
            if reply.message is not None:
                self.bytes_up += bytes_of(reply.message)
            yield reply

    def answer(self, number: int, clients: Sequence[int], answer_C: Tree | None) -> None:
        """The inner engine's; a question takes no time, and an ``AnsweringEngine`` stands inside of the clock."""
        self.inner.answer(number, clients, answer_C)

    def cancel(self, number: int) -> None:
        """Give a job up; what nobody has listened to is never done."""
        self._untimed.discard(number)
        for jobs in (self._arrivals, self._pending, self._dropped):
            jobs.pop(number, None)
        self.inner.cancel(number)

    def now(self) -> float:
        """Virtual seconds."""
        return self._time

    def set_time(self, seconds: float) -> None:
        """Let it be this time."""
        self._time = seconds

    def merge(self, aggregator: Aggregator, total: Any) -> Any:
        """The inner engine's."""
        return self.inner.merge(aggregator, total)

    def join(
        self, client_N: Tensor, metrics: Tree, lines: Sequence[Sequence[str]] = ()
    ) -> tuple[Tensor, Tree, tuple[tuple[str, ...], ...]]:
        """The inner engine's."""
        return self.inner.join(client_N, metrics, lines)


def _by_client(reply: Reply) -> Iterator[Reply]:
    """A reply of several clients as several."""
    message = reply.message
    if len(reply.clients) < 2 or (message is not None and len(message.client_C) != len(reply.clients)):
        yield reply
        return
    for place, client in enumerate(reply.clients):
        yield replace(reply, clients=(client,), message=None if message is None else rows_of(message, (place,)))
