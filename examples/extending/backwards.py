"""An engine in one file: clients run in this process, and the last message arrives first.

Messages may arrive in any order, and nothing may depend on it. With this engine a run must give the bytes of
``engine.name: local``. A package that brings it names it by an entry point::

    [project.entry-points."lichen.engines"]
    backwards = "backwards:KIND"
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

from torch import Tensor

from lichen.core.contracts import Aggregator, Engine
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.declared import Property
from lichen.engines.kinds import EngineKind, EngineSettings


@final
class Backwards:
    """The messages of another engine, the last one first."""

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

    def run(self, job: Job) -> Iterator[Message]:
        """The messages of this process, the last one first."""
        yield from reversed(list(self.inner.run(job)))

    def merge(self, aggregator: Aggregator, total: Any) -> Any:
        """As the inner engine."""
        return self.inner.merge(aggregator, total)

    def join(self, client_N: Tensor, metrics: Tree) -> tuple[Tensor, Tree]:
        """As the inner engine."""
        return self.inner.join(client_N, metrics)


@contextmanager
def make(settings: EngineSettings) -> Iterator[Backwards]:
    """The engine of this process, turned around."""
    yield Backwards(settings.local())


KIND = EngineKind(
    name="backwards",
    summary="this process, the last message first",
    make=make,
    allows=frozenset({Property.ALL_ROWS, Property.ONE_SERVER}),
)
