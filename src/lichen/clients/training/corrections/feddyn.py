"""FedDyn at the client: its loss is bent so that all clients' optima lie where the sum of their losses has its own.

    L_k(θ) - ⟨g_k, θ⟩ + α/2 ‖θ - θ_t‖²,   and after the round   g_k' = g_k - α (θ_k - θ_t)

where θ_t is what came down and θ_k what the client made of it. g_k, the gradient that the client has at its optimum,
is private state and begins at zero. What is kept is v_k = g_k / α, so that

    each gradient gains  α (θ - θ_t - v_k);   v_k' = v_k - (θ_k - θ_t)

and the server, :mod:`lichen.server.heterogeneity.feddyn`, needs no α. Nothing is sent beside the change.

References:
    Durmus Alp Emre Acar, Yue Zhao, Ramon Matas Navarro, Matthew Mattina, Paul N. Whatmough and Venkatesh Saligrama.
    "Federated Learning Based on Dynamic Regularization." ICLR 2021. https://arxiv.org/abs/2111.04263 (algorithm 1)

Legend: C clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.expected import TensorSpec
from lichen.core.message import Job
from lichen.core.tree import Tree

__all__ = ["FedDyn"]


@final
@dataclass(frozen=True, slots=True)
class FedDyn:
    """FedDyn's regularizer; a :class:`lichen.clients.training.gradient_step.GradientStep`.

    Args:
        alpha: α, how strongly a client is held; the paper uses 0.001 to 0.1.

    Raises:
        LichenError: if it is not positive.
    """

    alpha: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise LichenError(f"{self.alpha} is not positive", where="optimizer.alpha", fix="use 0.001 to 0.1")

    @property
    def name(self) -> str:
        """``feddyn``."""
        return "feddyn"

    def own(self, trainable_C: Tree) -> Tree:
        """v_k, at its first time zero."""
        return trees.zeros_like(trainable_C)

    def sends(self, trained: Mapping[str, TensorSpec]) -> Mapping[str, TensorSpec]:
        """Nothing."""
        return {}

    def init(self, job: Job, clients: Sequence[int], params_C: Tree, own_C: Tree) -> Tree:
        """v_k, and what came down."""
        mine_C = {name: own_C[name] for name in params_C}
        start = {name: job.shared.trainable[name] for name in params_C}
        return trees.join("own/", mine_C, trees.join("start/", start, {}))

    def update(self, grads_C: Tree, state: Tree, params_C: Tree, *, active_C: Tensor, exact: bool) -> tuple[Tree, Tree]:
        """The gradients of the bent loss."""
        mine_C, start = (trees.split(state, prefix)[0] for prefix in ("own/", "start/"))
        moved_C = {name: x_C - start[name] - mine_C[name] for name, x_C in params_C.items()}
        return trees.add(grads_C, trees.scale(moved_C, self.alpha)), state

    def final(self, state: Tree, delta_C: Tree, steps_C: Tensor) -> tuple[Tree, Tree]:
        """``({}, v_k')``."""
        mine_C, _ = trees.split(state, "own/")
        return {}, trees.sub(mine_C, delta_C)
