"""Batches of rows of two periods, one after the other, each with a sign which of the two it is of.

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch

from lichen.core.contracts.client import Source
from lichen.core.contracts.model import Batch

__all__ = ["NOW", "TwoPeriods"]

NOW = "now_C"
"""The batch's sign: bool, whether its rows are of the later period; the same for all clients of a batch."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TwoPeriods:
    """Every row of the earlier period, then every row of the later one.

    A client may have no rows in one of them.

    Attributes:
        then: The earlier period's rows, each once.
        now: The later period's.
    """

    then: Source
    now: Source

    def shape(self, client: int) -> Hashable:
        """Both sources'."""
        return self.then.shape(client), self.now.shape(client)

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """The batches of both, with :data:`NOW`."""
        for source, is_now in ((self.then, False), (self.now, True)):
            for batch in source.batches(clients, seed):
                yield {**batch, NOW: torch.full((len(clients),), is_now)}
