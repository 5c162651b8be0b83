"""Rounds in which one client unlearns its rows and rounds in which the others go on learning theirs, in turns.

The client trains alone, on its own machine, by a loss that makes its rows less likely, such as negative preference
optimization (:mod:`lichen.models.preference.negative`). In the round after it the others train as they always did.
Nobody sees anybody's rows: the forgetting and the retaining term of the published loss are parted by owner, and take
turns in place of being added up, each with its factor on the learning rate in place of one on the loss.

References:
    Ruiqi Zhang, Licong Lin, Yu Bai and Song Mei. "Negative Preference Optimization: From Catastrophic Collapse to
    Effective Unlearning." COLM 2024. https://arxiv.org/abs/2404.05868
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import final

from lichen.algorithms.average import Average
from lichen.algorithms.unlearning.others import judges_but
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.wire.shared import Shared
from lichen.server.unlearning.invited import AllBut, Fixed

__all__ = ["Alternate"]


@final
@dataclass(frozen=True, slots=True)
class Alternate:
    """The first round is the client's, the second the others', and so on.

    Args:
        average: All rounds, as many as they are to be; its work is the others'.
        client: Who unlearns; it does not judge.
        forget: Its work.
        forget_rate: γ, the factor on its learning rate.
        retain_rate: α, that on the others'.
    """

    average: Average
    _: KW_ONLY
    client: int
    forget: str = "npo"
    forget_rate: float = 1.0
    retain_rate: float = 1.0

    def init(self, shared: Shared) -> ServerState:
        """The state before the first round, from the finished model."""
        return self.average.init(shared)

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """The client's round or the others'."""
        average, gone = self.average, frozenset((self.client,))
        average = replace(average, validators=judges_but(average, gone))
        if state.round % 2 == 0:
            average = replace(average, sampler=Fixed(gone), work=self.forget, lr_scale=lambda _: self.forget_rate)
        else:
            average = replace(average, sampler=AllBut(average.sampler, gone), lr_scale=lambda _: self.retain_rate)
        return average.round(state, engine, seed)
