"""An engine without clients: it answers a job with what it was given."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, final

from torch import Tensor

from lichen.core.contracts.server import Aggregator
from lichen.core.message import Job, Message
from lichen.core.replies import Reply
from lichen.core.tree import Tree
from lichen.engines.local import sorted_by_client

__all__ = ["ScriptedEngine"]


@final
class ScriptedEngine:
    """Answers every job with ``script(job)``: pairs of the clients that were asked and their message."""

    bytes_up = bytes_down = 0

    def __init__(self, script: Callable[[Job], Sequence[tuple[tuple[int, ...], Message]]]) -> None:
        self.script, self.jobs = script, list[Job]()

    def submit(self, job: Job) -> int:
        self.jobs.append(job)
        return len(self.jobs) - 1

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        for number in numbers:
            for clients, message in self.script(self.jobs[number]):
                yield Reply(job=number, clients=clients, message=message)

    def cancel(self, number: int) -> None:
        pass

    def now(self) -> float:
        return 0.0

    def merge(self, aggregator: Aggregator, total: Any) -> Any:
        return total

    def join(
        self, client_N: Tensor, metrics: Tree, lines: Sequence[Sequence[str]] = ()
    ) -> tuple[Tensor, Tree, tuple[tuple[str, ...], ...]]:
        return *sorted_by_client(client_N, metrics), tuple(tuple(line) for line in lines)
