"""An engine in one file: clients run in this process, and the last reply arrives first.

Replies may arrive in any order, and nothing may depend on it. With this engine a run must give the bytes of
``engine.name: local``. A package that brings it names it by an entry point::

    [project.entry-points."lichen.engines"]
    backwards = "backwards:KIND"
"""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import final

from lichen.core.contracts.engine import Engine
from lichen.core.message import Job
from lichen.core.replies import Reply
from lichen.declared import Property
from lichen.engines.around import ForwardingEngine
from lichen.engines.kinds import EngineKind, EngineSettings


@final
class Backwards(ForwardingEngine):
    """The replies of another engine, the last one first."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner

    def submit(self, job: Job) -> int:
        """As the inner engine."""
        return self.inner.submit(job)

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """The replies of this process, the last one first."""
        yield from reversed(list(self.inner.replies(numbers, until)))

    def cancel(self, number: int) -> None:
        """As the inner engine."""
        self.inner.cancel(number)


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
