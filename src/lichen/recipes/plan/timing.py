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

from lichen.core.contracts import Batch, ClientTask, Source
from lichen.engines.local import LocalEngine
from lichen.recipes.assemble.workload import Load, load_of
from lichen.recipes.plan.memory import Gauge

__all__ = ["Laps", "Rate", "Timed", "clocked", "spread"]

Laps = list[tuple[Load, float]]
"""Batches and the seconds each took."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """Jobs that were run.

    Attributes:
        load: What their batches held.
        inside: Seconds between batches.
        whole: Seconds in all.
        clients: How often a client was asked.
        up: Bytes a client sends.
        down: Bytes it is sent.
        largest: Tokens of the largest batch, or rows without tokens.
    """

    load: Load
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
        return cls(unit=timed.inside / max(1.0, timed.load.units), client=rest)

    def seconds(self, load: Load, clients: float) -> float:
        """Of so much work.

        >>> Rate(unit=0.5, client=2.0).seconds(Load(rows=1, tokens=10), 3)
        11.0
        """
        return self.unit * load.units + self.client * clients


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Clock:
    """A source whose batches are timed until the next one is asked for."""

    source: Source
    settle: Callable[[], None]
    laps: Laps = field(default_factory=list)
    every: int = 1

    def shape(self, client: int) -> Hashable:
        return self.source.shape(client)

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        start = time.perf_counter()
        for batch in islice(self.source.batches(clients, seed), 0, None, self.every):
            yield batch
            self.settle()
            self.laps.append((load_of(batch), time.perf_counter() - start))
            start = time.perf_counter()


def clocked(engine: LocalEngine, gauge: Gauge, *, every: int = 1) -> Laps:
    """Put clocks into an engine's stations; the list fills as it works.

    Args:
        engine: Whose stations are replaced.
        gauge: Knows when the device is done.
        every: Evaluate only every n-th batch; training is not thinned.
    """
    laps: Laps = []
    engine.client_tasks = {
        name: ClientTask(
            work=client_task.work,
            source=_Clock(
                source=client_task.source,
                settle=gauge.settle,
                laps=laps,
                every=1 if name.startswith(("train ", "alone lr")) else every,
            ),
        )
        for name, client_task in engine.client_tasks.items()
    }
    return laps


def spread(clients: Sequence[int], count: int) -> tuple[int, ...]:
    """So many clients, evenly over all of them.

    >>> spread(range(10), 4)
    (0, 2, 5, 7)
    """
    count = min(count, len(clients))
    return tuple(clients[i * len(clients) // count] for i in range(count))
