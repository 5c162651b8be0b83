"""The engine of several processes: the engine of a federation, whose sites are children that are asked over pipes.

It goes through all that a real federation goes through, on one machine: a node (:mod:`lichen.engines.node`) is a site
that knows nothing of the server but what it is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import final

from lichen.core.message import Job
from lichen.core.replies import Reply
from lichen.engines.around import ForwardingEngine
from lichen.engines.federated import FederatedEngine, Patience
from lichen.engines.pipe_sites import Child, PipeSites

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
        sites = PipeSites(dict.fromkeys(names, tuple(command)))
        self._begin(sites, lambda client: names[client % nodes], "", "", agreed)
        self._ends_nodes = True

    @classmethod
    def over(
        cls, sites: PipeSites, site_of: Callable[[int], str], *, recipe: str, state: str, agreed: str
    ) -> SpawnedEngine:
        """An engine over processes that stay when it is closed.

        Args:
            sites: The processes.
            site_of: A client to the name of its site.
            recipe: Digest of the recipe that every site must have.
            state: Name of the private state that its jobs are for.
            agreed: Digest of the shared tensors that every site holds when it starts; empty for none.
        """
        made = cls.__new__(cls)
        made._begin(sites, site_of, recipe, state, agreed)
        made._ends_nodes = False
        return made

    def _begin(self, sites: PipeSites, site_of: Callable[[int], str], recipe: str, state: str, agreed: str) -> None:
        # A child that is there may take as long as it likes, to load a model; one that has ended does not come back.
        patience = Patience(gone=0.0, quiet=math.inf)
        self.sites = sites
        self._federated = FederatedEngine(sites, site_of, recipe=recipe, state=state, agreed=agreed, patience=patience)
        self.inner = self._federated

    @property
    def nodes(self) -> list[Child]:
        """The processes, where they were started."""
        return list(self.sites.children.values())

    def submit(self, job: Job) -> int:
        """Hand each node the job of its clients; all are started that are not alive."""
        self.sites.start()
        return self.inner.submit(job)

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """One reply a client, as they arrive."""
        yield from self.inner.replies(numbers, until)

    def cancel(self, number: int) -> None:
        """Give a job up; what no node has begun is never done."""
        self.inner.cancel(number)

    def close(self) -> None:
        """End the nodes, if they are its own; a later job starts them again."""
        self._federated.close()
        if self._ends_nodes:
            self.sites.close()

    def __enter__(self) -> SpawnedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
