"""An engine in one file: clients run in this process, and the last reply arrives first.

Replies may arrive in any order, and nothing may depend on it. With this engine a run must give the bytes of
``engine.name: local``. A package that brings it names it by an entry point::

    [project.entry-points."lichen.engines"]
    backwards = "backwards:KIND"
"""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

from torch import Tensor

from lichen.core.contracts import Aggregator, Engine
from lichen.core.message import Job
from lichen.core.replies import Reply
from lichen.core.tree import Tree
from lichen.declared import Property
from lichen.engines.kinds import EngineKind, EngineSettings


@final
class Backwards:
    """The replies of another engine, the last one first."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner

    @property
    def bytes_up(self) -> int:
        """Bytes from clients to server so far."""
        return self.inner.bytes_up

    @property
    def bytes_down(self) -> int:
        """Bytes from server to clients so far."""
        return self.inner.bytes_down

    def submit(self, job: Job) -> int:
        """As the inner engine."""
        return self.inner.submit(job)

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """The replies of this process, the last one first."""
        yield from reversed(list(self.inner.replies(numbers, until)))

    def answer(self, number: int, clients: Sequence[int], answer_C: Tree | None) -> None:
        """As the inner engine."""
        self.inner.answer(number, clients, answer_C)

    def cancel(self, number: int) -> None:
        """As the inner engine."""
        self.inner.cancel(number)

    def now(self) -> float:
        """As the inner engine."""
        return self.inner.now()

    def merge(self, aggregator: Aggregator, total: Any) -> Any:
        """As the inner engine."""
        return self.inner.merge(aggregator, total)

    def join(
        self, client_N: Tensor, metrics: Tree, lines: Sequence[Sequence[str]] = ()
    ) -> tuple[Tensor, Tree, tuple[tuple[str, ...], ...]]:
        """As the inner engine."""
        return self.inner.join(client_N, metrics, lines)


@contextmanager
def make(settings: EngineSettings) -> Iterator[Backwards]:
    """The engine of this process, turned around."""
    yield Backwards(settings.local())


KIND = EngineKind(
    name="backwards",
    summary="this process, the last reply first",
    make=make,
    allows=frozenset({Property.ALL_ROWS, Property.ONE_SERVER}),
)
