"""FedNova at the client: beside its change it says how far its steps reach, so that the server can even this out.

A client that takes more steps moves further, and a plain mean follows it. Its *reach* (the paper's ‖a‖₁) is
:func:`lichen.core.conventions.reach.reach` of its steps. The server's half is
:mod:`lichen.server.heterogeneity.fednova`.

References:
    Jianyu Wang, Qinghua Liu, Hao Liang, Gauri Joshi and H. Vincent Poor. "Tackling the Objective Inconsistency Problem
    in Heterogeneous Federated Optimization." NeurIPS 2020. https://arxiv.org/abs/2007.07481 (section 4)

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core.conventions.reach import REACH, reach
from lichen.core.expected import TensorSpec
from lichen.core.message import Job
from lichen.core.tree import Tree

__all__ = ["Reach"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """Sends how far a client's steps reach; a :class:`lichen.clients.training.gradient_step.GradientStep`.

    Attributes:
        lr: The learning rate, before the job's ``lr_scale``.
        momentum: Of the client's SGD.
        prox: FedProx's μ.
    """

    lr: float
    momentum: float = 0.0
    prox: float = 0.0

    @property
    def name(self) -> str:
        """``fednova``."""
        return "fednova"

    def own(self, trainable_C: Tree) -> Tree:
        """Nothing."""
        return {}

    def sends(self, trained: Mapping[str, TensorSpec]) -> Mapping[str, TensorSpec]:
        """The reach."""
        return {REACH: TensorSpec((1,), torch.float64)}

    def init(self, job: Job, clients: Sequence[int], params_C: Tree, own_C: Tree) -> Tree:
        """The round's η μ."""
        rate = self.lr * job.settings.get("lr_scale", 1.0)
        return {"pull": torch.tensor(rate * self.prox, dtype=torch.float64)}

    def update(self, grads_C: Tree, state: Tree, params_C: Tree, *, active_C: Tensor, exact: bool) -> tuple[Tree, Tree]:
        """The gradients as they are."""
        return grads_C, state

    def final(self, state: Tree, delta_C: Tree, steps_C: Tensor) -> tuple[Tree, Tree]:
        """``(reach, {})``."""
        steps = [int(count) for count in steps_C.tolist()]
        found = reach(max(steps, default=0), momentum=self.momentum, pull=float(state["pull"]))
        device = next(iter(delta_C.values())).device
        return {REACH: torch.tensor([[found[count]] for count in steps], dtype=torch.float64, device=device)}, {}
