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

__all__ = ["SpawnedEngine", "children_of", "over_children"]


def children_of(command: Sequence[str], nodes: int) -> PipeSites:
    """So many processes of one command; they are started by the first engine over them that needs them."""
    return PipeSites({f"node {place}": tuple(command) for place in range(nodes)})


def over_children(children: PipeSites, *, state: str = "", agreed: str = "") -> FederatedEngine:
    """The engine over some processes: client c lives on process c mod their number. They outlive it.

    Args:
        children: The processes.
        state: Name of the private state that its jobs are for.
        agreed: Digest of the shared tensors that every process holds when it starts; empty for none.
    """
    names = list(children.commands)
    return FederatedEngine(
        children, lambda client: names[client % len(names)], state=state, agreed=agreed, patience=CHILDREN
    )


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
        self.sites = children_of(command, nodes)
        self._federated = over_children(self.sites, agreed=agreed)
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
