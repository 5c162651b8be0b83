"""Agnostic federated learning: average under the worst mixture of clients seen so far.

    min over w, max over λ in the simplex, of Σ λ_k F_k(w)

Every round averages the clients' changes by λ and then lets λ climb their losses
(:mod:`lichen.server.fairness.minmax`). λ is part of the server optimizer's state, so a resumed run goes on with it.

References:
    Mehryar Mohri, Gary Sivek and Ananda Theertha Suresh. "Agnostic Federated Learning." ICML 2019.
    https://arxiv.org/abs/1902.00146
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import final

from lichen.algorithms.average import Average
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.wire.shared import Shared
from lichen.server.fairness.minmax import MinMax, MixtureAscent

__all__ = ["AFL"]


@final
@dataclass(frozen=True, slots=True)
class AFL:
    """Min-max rounds.

    Args:
        average: The rounds; its aggregator is not used.
        rate: γ, what one unit of loss adds to a client's λ before it is projected.

    Raises:
        LichenError: if the rate is not positive.
    """

    average: Average
    _: KW_ONLY
    rate: float = 0.1

    def __post_init__(self) -> None:
        self._optimizer()

    def _optimizer(self) -> MixtureAscent:
        return MixtureAscent(self.average.optimizer, clients=len(self.average.weight_N), rate=self.rate)

    def init(self, shared: Shared) -> ServerState:
        """The state before the first round, with equal shares."""
        return ServerState(round=0, shared=shared, optimizer=self._optimizer().init(shared))

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One round under this round's mixture, which then climbs."""
        mixture = tuple(state.optimizer["fair.mixture"].tolist())
        average = replace(self.average, aggregator=MinMax(mixture), optimizer=self._optimizer())
        return average.round(state, engine, seed)
