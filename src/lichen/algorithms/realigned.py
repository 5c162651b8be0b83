"""FedBiOT's turn of the owner: after some rounds the emulator's middle is aligned with the model, its ends moved.

While clients train the ends, what the emulator was distilled for grows old. The owner has the model with these ends,
and patches the emulator's middle so that it gives what the model's middle gives. Clients get the patch with each job.

References:
    Feijie Wu, Zitao Li, Yaliang Li, Bolin Ding and Jing Gao. "FedBiOT: LLM Local Fine-tuning in Federated Learning
    without Full Model." KDD 2024. https://arxiv.org/abs/2406.17706
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import final

import torch

from lichen.core.contracts.server import ServerOptimizer
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["Realigned"]

_ROUND = "realigned.round"


@final
@dataclass(frozen=True, slots=True)
class Realigned:
    """A server optimizer, and after every so many of its steps a new patch of frozen weights.

    Args:
        optimizer: Steps with the clients' change.
        every: Steps between two alignments.
        align: ``(shared, steps so far)`` to the whole patch, by the names of :attr:`Shared.patch`.
    """

    optimizer: ServerOptimizer
    _: KW_ONLY
    every: int
    align: Callable[[Shared, int], Tree]

    def init(self, shared: Shared) -> Tree:
        """The optimizer's state, with the number of its steps."""
        return {**self.optimizer.init(shared), _ROUND: torch.zeros((), dtype=torch.int64)}

    def update(self, change: Shared, state: Tree, shared: Shared) -> tuple[Shared, Tree]:
        """``(shared, state)`` after the clients' step and, where it is time, the owner's."""
        done = int(state[_ROUND]) + 1
        rest = {name: x for name, x in state.items() if name != _ROUND}
        shared, rest = self.optimizer.update(change, rest, shared)
        if done % self.every == 0:
            shared = shared | Shared(patch=self.align(shared, done))
        return shared, {**rest, _ROUND: torch.tensor(done)}
