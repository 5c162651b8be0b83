"""Gradient accumulation: cuts a batch into micro-batches that fit the memory.

The rows of every batch are cut into ``parts`` pieces, one after the other. Which rows a step sees does not depend on
the number of pieces, so a work that adds up their gradients (:class:`lichen.clients.training.train.Train`) takes the
step of the whole batch, up to rounding.

Legend: C clients, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch

from lichen.core.contracts.client import Costed, Source
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError

__all__ = ["MicroBatches"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class MicroBatches:
    """Another source's batches, each in so many pieces; the last ones may hold padding alone, or nothing.

    Args:
        source: Batches whose tensors all have rows on their second axis, but for ``active_C``.
        parts: Pieces of a batch.

    Raises:
        LichenError: if there is not at least one piece.
    """

    source: Source
    parts: int

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise LichenError(f"parts is {self.parts}", where="MicroBatches", fix="use a number above 0")

    def shape(self, client: int) -> Hashable:
        """The source's."""
        return self.source.shape(client)

    def cost(self, client: int) -> int:
        """The source's, where it knows one."""
        return self.source.cost(client) if isinstance(self.source, Costed) else 1

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """``parts`` pieces for every batch of the source."""
        for batch in self.source.batches(clients, seed):
            pieces = {name: torch.tensor_split(x, self.parts, 1) for name, x in batch.items() if name != "active_C"}
            for part in range(self.parts):
                yield {"active_C": batch["active_C"], **{name: cut[part] for name, cut in pieces.items()}}
