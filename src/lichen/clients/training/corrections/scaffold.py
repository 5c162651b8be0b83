"""SCAFFOLD at the client: every gradient is corrected by how this client's gradients differ from everybody's.

    g + c - c_k,   and after K steps of rate lr   c_k' = c_k - c + (x - y_k) / (K lr)

where x is what came down and y_k what the client made of it: option II of the paper, for which c_k' is the mean of
the gradients that the client has seen. The server's control variate c comes as the shared tensors ``control.<name>``,
which nobody trains. The client's, c_k, is private state and begins at zero. What is sent beside the change is
c_k' - c_k, as ``control.<name>``; the server adds their sum, divided by the N clients of the whole roster, to c.

The formula holds for plain SGD at one rate in all steps of a round, with nothing after this link in the chain. With
momentum, or decay in the optimizer, c_k is no mean of gradients.

References:
    Sai Praneeth Karimireddy, Satyen Kale, Mehryar Mohri, Sashank J. Reddi, Sebastian U. Stich and Ananda
    Theertha Suresh. "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning." ICML 2020.
    https://arxiv.org/abs/1910.06378 (algorithm 1)

Legend: C clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.expected import TensorSpec
from lichen.core.message import Job
from lichen.core.tree import Tree
from lichen.core.wire.shared import CONTROL

__all__ = ["Scaffold"]


@final
@dataclass(frozen=True, slots=True)
class Scaffold:
    """SCAFFOLD's correction; a :class:`lichen.clients.training.gradient_step.GradientStep`.

    Args:
        lr: The learning rate of the client's SGD, before the job's ``lr_scale``.

    Raises:
        LichenError: if it is not positive.
    """

    lr: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise LichenError(f"{self.lr} is not positive", where="train.scaffold", fix="use the optimizer's rate")

    @property
    def name(self) -> str:
        """``scaffold``."""
        return "scaffold"

    def own(self, trainable_C: Tree) -> Tree:
        """c_k, at its first time zero."""
        return trees.zeros_like(trainable_C)

    def sends(self, trained: Mapping[str, TensorSpec]) -> Mapping[str, TensorSpec]:
        """How far c_k went, of every trained tensor."""
        return {f"{CONTROL}.{name}": spec for name, spec in trained.items()}

    def init(self, job: Job, clients: Sequence[int], params_C: Tree, own_C: Tree) -> Tree:
        """c_k, and the correction c - c_k; the round's rate.

        Raises:
            LichenError: if the job lacks the server's control variates.
        """
        server = job.shared.group(CONTROL)
        missing = [name for name in params_C if name not in server]
        if missing:
            raise LichenError(
                f"tensor '{CONTROL}.{missing[0]}' did not come down",
                where="job",
                fix="let the shared tensors begin with zeros of that name",
            )
        mine_C = {name: own_C[name] for name in params_C}
        rate = torch.tensor(self.lr * job.settings.get("lr_scale", 1.0), dtype=torch.float64)
        # c - c_k: a stacked c_k from an unstacked c.
        correction_C = {name: server[name] - x_C for name, x_C in mine_C.items()}
        return trees.join("own/", mine_C, trees.join("correction/", correction_C, {"rate": rate}))

    def update(self, grads_C: Tree, state: Tree, params_C: Tree, *, active_C: Tensor, exact: bool) -> tuple[Tree, Tree]:
        """The gradients with the correction added."""
        return trees.add(grads_C, trees.split(state, "correction/")[0]), state

    def final(self, state: Tree, delta_C: Tree, steps_C: Tensor) -> tuple[Tree, Tree]:
        """``(control.<name>: c_k' - c_k, c_k')``."""
        mine_C, correction_C = (trees.split(state, prefix)[0] for prefix in ("own/", "correction/"))
        travel_C = steps_C * state["rate"].to(steps_C)
        after_C: Tree = {}
        for name, x_C in mine_C.items():
            column_C = travel_C.view(-1, *[1] * (x_C.dim() - 1))
            mean_C = -(delta_C[name] / column_C.to(x_C)) - correction_C[name]
            after_C[name] = torch.where(column_C > 0, mean_C, x_C)
        return trees.join(f"{CONTROL}.", trees.sub(after_C, mine_C), {}), after_C
