"""Times each kind of work on a few batches.

A station keeps its work; only its source is put behind a clock, which starts when a batch is asked for and stops
when the next one is. What is left of a job's time belongs to its clients: their state, their bytes, the fold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import final

from lichen.core.contracts.client import ClientTask, Source
from lichen.core.contracts.model import Batch
from lichen.engines.local import LocalEngine
from lichen.recipes.assemble.workload import Workload, workload_of
from lichen.recipes.plan.memory import MemoryMeter

__all__ = ["Rate", "Timed", "Timings", "evenly_spaced", "with_timing"]

Timings = list[tuple[Workload, float]]
"""Batches and the seconds each took."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """Jobs that were run.

    Attributes:
        workload: What their batches held.
        inside: Seconds between batches.
        whole: Seconds in all.
        clients: How often a client was asked.
        up: Bytes a client sends.
        down: Bytes it is sent.
        largest: Tokens of the largest batch, or rows without tokens.
    """

    workload: Workload
    inside: float
    whole: float
    clients: int
    up: int
    down: int
    largest: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Seconds of a work.

    Attributes:
        unit: Of a token, or of a row without tokens.
        client: Of a client beside its batches.
    """

    unit: float
    client: float

    @classmethod
    def of(cls, timed: Timed) -> Rate:
        """The rate these jobs had."""
        rest = max(0.0, timed.whole - timed.inside) / max(1, timed.clients)
        return cls(unit=timed.inside / max(1.0, timed.workload.units), client=rest)

    def seconds(self, workload: Workload, clients: float) -> float:
        """Of so much work.

        >>> Rate(unit=0.5, client=2.0).seconds(Workload(rows=1, tokens=10), 3)
        11.0
        """
        return self.unit * workload.units + self.client * clients


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _TimedSource:
    """A source whose batches are timed until the next one is asked for."""

    source: Source
    settle: Callable[[], None]
    timings: Timings = field(default_factory=list)
    every: int = 1

    def shape(self, client: int) -> Hashable:
        return self.source.shape(client)

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        start = time.perf_counter()
        for batch in islice(self.source.batches(clients, seed), 0, None, self.every):
            yield batch
            self.settle()
            self.timings.append((workload_of(batch), time.perf_counter() - start))
            start = time.perf_counter()


def with_timing(engine: LocalEngine, meter: MemoryMeter, *, every: int = 1) -> Timings:
    """Put clocks into an engine's stations; the list fills as it works.

    Args:
        engine: Whose stations are replaced.
        meter: Knows when the device is done.
        every: Evaluate only every n-th batch; training is not thinned.
    """
    timings: Timings = []
    engine.client_tasks = {
        name: ClientTask(
            work=client_task.work,
            source=_TimedSource(
                source=client_task.source,
                settle=meter.settle,
                timings=timings,
                every=1 if name.startswith(("train ", "alone lr")) else every,
            ),
        )
        for name, client_task in engine.client_tasks.items()
    }
    return timings


def evenly_spaced(clients: Sequence[int], count: int) -> tuple[int, ...]:
    """So many clients, evenly over all of them.

    >>> evenly_spaced(range(10), 4)
    (0, 2, 5, 7)
    """
    count = min(count, len(clients))
    return tuple(clients[i * len(clients) // count] for i in range(count))
