"""The engine of one process: clients side by side over one copy of the foundation model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

from torch import Tensor

from lichen.core.contracts import Aggregator, ClientTask
from lichen.core.fold import ClientsPerBlock, serve
from lichen.core.message import Job, Message, size, sizes, take_client
from lichen.core.store import ClientStore
from lichen.core.tree import Tree

__all__ = ["LocalEngine", "sorted_by_client"]


def sorted_by_client(client_N: Tensor, metrics: Tree) -> tuple[Tensor, Tree]:
    """Both in the clients' order, whatever order they arrived in."""
    order = client_N.argsort()
    return client_N[order], {name: x[order] for name, x in metrics.items()}


@final
class LocalEngine:
    """Runs jobs here, and counts the bytes that each client would have sent and received.

    Args:
        client_tasks: What can be asked, by the job's ``work``.
        store: The clients' private state.
        base: Digest of the frozen base model.
        block_size: Clients side by side, or what finds it for a job.
        device: Where they are trained.
    """

    def __init__(
        self,
        client_tasks: Mapping[str, ClientTask],
        store: ClientStore,
        *,
        base: str = "",
        block_size: int | ClientsPerBlock = 8,
        device: str = "cpu",
    ) -> None:
        self.client_tasks, self.store, self.base = client_tasks, store, base
        self.block_size, self.device = block_size, device
        self.bytes_up = 0
        self.bytes_down = 0

    def run(self, job: Job) -> Iterator[Message]:
        """One message a block, in a stable order."""
        if not job.clients:
            return
        self.bytes_down += sizes(job)
        for message in serve(
            job, self.client_tasks, self.store, base=self.base, block_size=self.block_size, device=self.device
        ):
            clients = message.client_C.shape[0]
            if message.texts:
                self.bytes_up += sum(size(take_client(message, c)) for c in range(clients))
            else:
                self.bytes_up += size(message) * clients
            yield message

    def merge(self, aggregator: Aggregator, total: Any) -> Any:
        """The total: there is one rank."""
        return total

    def join(self, client_N: Tensor, metrics: Tree) -> tuple[Tensor, Tree]:
        """The same, sorted by client."""
        return sorted_by_client(client_N, metrics)
