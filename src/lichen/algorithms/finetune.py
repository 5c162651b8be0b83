"""Steps of each client's own from the shared model, after the rounds: the baseline that personal methods must beat.

A stage trains on, and is followed by a validation by which each client keeps its best (:mod:`lichen.algorithms.alone`),
so that of several numbers of steps everybody has its own. A stage without steps is the shared model itself.

References:
    Tao Yu, Eugene Bagdasaryan and Vitaly Shmatikov. "Salvaging Federated Learning by Local Adaptation." 2020.
    https://arxiv.org/abs/2002.04758
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from lichen.algorithms.alone import Alone
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.wire.shared import Shared

__all__ = ["Finetune"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Finetune:
    """One stage a round, from shared tensors that stay as they are.

    Args:
        alone: Private training and its validation; its rounds are the stages.
        works: The training of each stage.
        steps: Of each stage; a report of one without steps says that nobody was asked to train.
    """

    alone: Alone
    works: tuple[str, ...]
    steps: tuple[int, ...]

    def init(self, shared: Shared) -> ServerState:
        """The state before the first stage, from the shared model."""
        return self.alone.init(shared)

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """The next stage of everybody. Nothing is sent, so no bytes are reported."""
        after, report = replace(self.alone, work=self.works[state.round]).round(state, engine, seed)
        return after, report if self.steps[state.round] else replace(report, clients=())
