"""A source whose clients share no block: what crosses a cut is one client's, whatever others there are."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

from lichen.core.contracts.client import Costed, Source
from lichen.core.contracts.model import Batch

__all__ = ["OneByOne"]


@final
@dataclass(frozen=True, slots=True)
class OneByOne:
    """Batches of the inner source, a client at a time.

    Args:
        inner: Any.
    """

    inner: Source

    def shape(self, client: int) -> Hashable:
        """The inner one's, and whose it is."""
        return client, self.inner.shape(client)

    def cost(self, client: int) -> int:
        """The inner one's; 1 where that knows none."""
        return self.inner.cost(client) if isinstance(self.inner, Costed) else 1

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """The inner one's."""
        return self.inner.batches(clients, seed)
