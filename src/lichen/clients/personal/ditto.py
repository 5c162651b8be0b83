"""Ditto: beside the shared model every client trains one of its own, which is pulled towards the shared one.

The shared tensors w are trained and averaged as ever. Beside them each client steps its own tensors v on the same
batches, by the gradient of ``F_k(v) + mu / 2 |v - w|^2``, where w is what the round began with. With ``mu`` 0 the own
model is the one of training alone. The pull lies behind the clip, so that it is never cut.

References:
    Tian Li, Shengyuan Hu, Ahmad Beirami and Virginia Smith. "Ditto: Fair and Robust Federated
    Learning Through Personalization." ICML 2021. https://arxiv.org/abs/2012.04221

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from lichen.clients.personal.training import own_training
from lichen.clients.training.train import Train, TrainState
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch
from lichen.core.message import Job
from lichen.core.tree import Tree

__all__ = ["Ditto"]


@final
@dataclass(frozen=True, slots=True)
class Ditto:
    """Ditto as a :class:`lichen.clients.personal.training.PersonalMethod`.

    Args:
        mu: How strong the pull is.
    """

    mu: float

    def init(
        self, train: Train, job: Job, clients: Sequence[int], mine_C: Tree, shared: Any
    ) -> tuple[tuple[Train, TrainState], Any]:
        """The own tensors where they were left, at first the shared ones; raises as the training."""
        own = own_training(train, mu=self.mu)
        return (own, own.init(job, clients, mine_C or None)), shared

    def step(
        self, train: Train, own: tuple[Train, TrainState], shared: Any, batch: Batch
    ) -> tuple[tuple[Train, TrainState], Any]:
        """One step of the own tensors."""
        work, state = own
        return (work, work.step(state, batch)), shared

    def final(self, own: tuple[Train, TrainState], shared: Any, finite_C: Tensor) -> Tree:
        """The own tensors and their optimizer; each client's by whether its own training stayed finite."""
        work, state = own
        return work.final(state)[1] or {}

    def model(self, shared: Tree, mine_C: Tree) -> Tree:
        """The own tensors."""
        return trees.split(mine_C, "params/")[0]
