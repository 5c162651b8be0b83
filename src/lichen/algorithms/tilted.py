"""Tilted rounds: each counts its clients' losses from the tilted loss of the round before.

The rule is :mod:`lichen.server.fairness.tilted`'s. Its level is part of the server optimizer's state, so a resumed run
goes on with it.

References:
    Tian Li, Ahmad Beirami, Maziar Sanjabi and Virginia Smith. "Tilted Empirical Risk Minimization." ICLR 2021.
    https://arxiv.org/abs/2007.01162
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import final

from lichen.algorithms.average import Average
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.wire.shared import Shared
from lichen.server.fairness.tilted import LEVEL, LevelKeeper, TiltedMean
from lichen.server.sums.summed import Weighting

__all__ = ["Tilted"]


@final
@dataclass(frozen=True, slots=True)
class Tilted:
    """Rounds of a tilted mean.

    Args:
        average: The rounds; its aggregator is not used.
        tilt: t.
        weighting: What clients count before their loss.

    Raises:
        LichenError: if the tilt is not positive.
    """

    average: Average
    _: KW_ONLY
    tilt: float = 1.0
    weighting: Weighting = "examples"

    def __post_init__(self) -> None:
        TiltedMean(self.tilt)

    def init(self, shared: Shared) -> ServerState:
        """The state before the first round, without a level."""
        return ServerState(round=0, shared=shared, optimizer=LevelKeeper(self.average.optimizer).init(shared))

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One round from the level of the last."""
        rule = TiltedMean(self.tilt, level=float(state.optimizer[LEVEL]), weighting=self.weighting)
        optimizer = LevelKeeper(self.average.optimizer)
        return replace(self.average, aggregator=rule, optimizer=optimizer).round(state, engine, seed)
