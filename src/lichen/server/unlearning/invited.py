"""Who is invited while a client is unlearned: some clients and no others, or all that a sampler draws but for some."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lichen.core.contracts.server import Sampler

__all__ = ["AllBut", "Fixed"]


@final
@dataclass(frozen=True, slots=True)
class Fixed:
    """These clients, in every round; none of them: a round that trains nobody.

    Args:
        clients: Roster indices.
    """

    clients: Collection[int] = ()

    def invite(self, weight_N: Tensor, seed: int) -> tuple[int, ...]:
        """They, ascending; neither examples nor seed matter."""
        del weight_N, seed
        return tuple(sorted(self.clients))


@final
@dataclass(frozen=True, slots=True)
class AllBut:
    """Those whom a sampler draws from the whole roster, but for some: the others are invited as ever.

    Args:
        inner: Draws.
        gone: Roster indices that are never invited.
    """

    inner: Sampler
    gone: frozenset[int]

    def invite(self, weight_N: Tensor, seed: int) -> tuple[int, ...]:
        """Roster indices, ascending; raises as the sampler inside."""
        return tuple(client for client in self.inner.invite(weight_N, seed) if client not in self.gone)
