"""Takes a client's shares of all steps off a finished model, and repairs it with a few rounds of the others.

    w' = w - α η Σ_r p_{k,r} Δ_{k,r}

The baseline of unlearning by the server alone: what the others sent after a round answers what the client had sent in
it, so that the difference is a model which nobody ever trained, and which the repair brings back to the others' rows.

References:
    Chen Wu, Sencun Zhu and Prasenjit Mitra. "Federated Unlearning with Knowledge Distillation." 2022.
    https://arxiv.org/abs/2201.09441 (historical updates are subtracted; there the old model then teaches)
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import final

from lichen.algorithms.average import Average
from lichen.algorithms.unlearning.others import judges_but
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.unlearning.invited import AllBut

__all__ = ["Negate"]


@final
@dataclass(frozen=True, slots=True)
class Negate:
    """The subtraction, and the rounds after it.

    Args:
        average: The repairing rounds, as many as they are to be.
        added: What the client's messages have added (:func:`lichen.server.unlearning.part.added_by`); nothing: there
            is nothing to take off, and so nothing to repair.
        gone: The client, which is neither invited nor judges.
        rate: α.
    """

    average: Average
    _: KW_ONLY
    added: Tree
    gone: frozenset[int]
    rate: float = 1.0

    def init(self, shared: Shared) -> ServerState:
        """The finished model without the client's shares; where it has none, the model itself, all rounds done."""
        if not self.added:
            return replace(self.average.init(shared), round=self.average.rounds)
        trainable = {
            name: (x.double() - self.rate * self.added[name].to(x.device)).to(x.dtype) if name in self.added else x
            for name, x in shared.trainable.items()
        }
        return self.average.init(replace(shared, trainable=trainable))

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One round of the others."""
        sampler = AllBut(self.average.sampler, self.gone)
        average = replace(self.average, sampler=sampler, validators=judges_but(self.average, self.gone))
        return average.round(state, engine, seed)
