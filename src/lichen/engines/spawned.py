"""The engine of several processes: the engine of a federation, whose sites are children that are asked over pipes.

It goes through all that a real federation goes through, on one machine: a node (:mod:`lichen.engines.node`) is a site
that knows nothing of the server but what it is asked.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import final

from lichen.core.message import Job
from lichen.core.replies import Reply
from lichen.engines.around import ForwardingEngine
from lichen.engines.federated import FederatedEngine
from lichen.engines.pipe_sites import Child, PipeSites
from lichen.engines.remote.errands import CHILDREN

__all__ = ["SpawnedEngine"]


@final
class SpawnedEngine(ForwardingEngine):
    """Clients spread over spawned processes; what crosses is what is counted.

    A node whose process has ended costs its clients the round, and is started again for the next.

    Args:
        command: Starts one node that is asked on stdin and answers on stdout.
        nodes: Processes; client c lives on node c mod nodes.
        agreed: Digest of the shared tensors that every node holds when it starts; empty for none.
    """

    def __init__(self, command: Sequence[str], *, nodes: int = 1, agreed: str = "") -> None:
        names = [f"node {place}" for place in range(nodes)]
        self.sites = PipeSites(dict.fromkeys(names, tuple(command)))
        self._federated = FederatedEngine(
            self.sites, lambda client: names[client % nodes], agreed=agreed, patience=CHILDREN
        )
        self.inner = self._federated

    @property
    def nodes(self) -> list[Child]:
        """The processes, where they were started."""
        return list(self.sites.children.values())

    def submit(self, job: Job) -> int:
        """Hand each node the job of its clients; all are started that are not alive."""
        return self.inner.submit(job)

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """One reply a client, as they arrive."""
        yield from self.inner.replies(numbers, until)

    def cancel(self, number: int) -> None:
        """Give a job up; what no node has begun is never done."""
        self.inner.cancel(number)

    def close(self) -> None:
        """End the nodes; a later job starts them again."""
        self._federated.close()
        self.sites.close()

    def __enter__(self) -> SpawnedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
