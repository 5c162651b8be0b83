"""APFL: a client's model is a mixture of its own tensors and the shared ones, and the mixture's weight is learned.

A client's model is ``m = a v + (1 - a) w``: v are its own tensors, w its copy of the shared ones, which is trained and
sent as ever. In each step v goes down the gradient of ``F_k(m)`` by the client's optimizer, and a, from 0 to 1, by
plain gradient steps: its gradient is ``<v - w, grad F_k(m)>``. A finished model is mixed with the shared tensors that
the server has kept.

The paper learns a in the first step of each round; here every step does.

References:
    Yuyang Deng, Mohammad Mahdi Kamani and Mehrdad Mahdavi. "Adaptive Personalized Federated Learning."
    2020. https://arxiv.org/abs/2003.13461

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from lichen.clients.personal.training import own_training
from lichen.clients.training.train import Train, TrainState
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch
from lichen.core.message import Job
from lichen.core.tree import Tree

__all__ = ["Apfl"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ApflState:
    """The own tensors in training, and how much of the model they are; ``first_C`` as the round began with it."""

    work: Train
    own: TrainState
    alpha_C: Tensor
    first_C: Tensor


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Apfl:
    """APFL as a :class:`lichen.clients.personal.training.PersonalMethod`.

    Args:
        alpha: How much of a model its client's own tensors are at first, from 0 to 1.
        rate: Learning rate of that share; 0: it stays.
    """

    alpha: float
    rate: float

    def init(self, train: Train, job: Job, clients: Sequence[int], mine_C: Tree, shared: Any) -> tuple[ApflState, Any]:
        """The own tensors where they were left, at first the shared ones; raises as the training."""
        work, rest = own_training(train), dict(mine_C)
        alpha_C = rest.pop("alpha", None)
        own = work.init(job, clients, rest or None)
        if alpha_C is None:
            device = next(iter(own.params_C.values())).device
            alpha_C = torch.full((len(clients),), self.alpha, dtype=torch.float32, device=device)
        return ApflState(work=work, own=own, alpha_C=alpha_C, first_C=alpha_C), shared

    def step(self, train: Train, own: ApflState, shared: Any, batch: Batch) -> tuple[ApflState, Any]:
        """One step of the own tensors, and of their share of the model."""
        state: TrainState = own.own
        w_C = {**shared.frozen_C, **shared.params_C}
        apart_C = trees.sub(state.params_C, {name: w_C[name] for name in state.params_C})
        leaves_C = {
            name: (w_C[name] + _per(own.alpha_C, x_C) * x_C).detach().requires_grad_() for name, x_C in apart_C.items()
        }
        with torch.enable_grad():
            loss_C, count_C = own.work.model.loss(leaves_C, state.fixed, batch)
            mean = (loss_C / count_C.clamp(min=1)).sum()
            grads = torch.autograd.grad(mean, list(leaves_C.values()), allow_unused=True, materialize_grads=True)
        grads_C = dict(zip(leaves_C, grads, strict=True))
        scaled_C = {name: _per(own.alpha_C, x_C) * x_C for name, x_C in grads_C.items()}
        stepped = own.work.stepped(state, batch, scaled_C, loss_C.detach(), count_C)
        moved_C = (own.alpha_C - self.rate * _dot_C(apart_C, grads_C)).clamp(0, 1)
        active_C = batch["active_C"].to(moved_C.device) & moved_C.isfinite()
        return replace(own, own=stepped, alpha_C=torch.where(active_C, moved_C, own.alpha_C)), shared

    def final(self, own: ApflState, shared: Any, finite_C: Tensor) -> Tree:
        """The own tensors, their optimizer and their share."""
        mine_C = own.work.final(own.own)[1] or {}
        stays_C = finite_C.to(own.alpha_C.device)
        return {**mine_C, "alpha": torch.where(stays_C, own.alpha_C, own.first_C)}

    def model(self, shared: Tree, mine_C: Tree) -> Tree:
        """The mixtures."""
        own_C, rest = trees.split(mine_C, "params/")
        return {
            name: shared[name] + _per(rest["alpha"], x_C) * (x_C - shared[name].to(x_C)) for name, x_C in own_C.items()
        }


def _per(alpha_C: Tensor, x_C: Tensor) -> Tensor:
    return alpha_C.to(x_C).view(-1, *[1] * (x_C.dim() - 1))


def _dot_C(a_C: Tree, b_C: Tree) -> Tensor:
    """Inner product of each client's trees, client by client: the same bits in any company."""
    names, count = sorted(a_C), next(iter(a_C.values())).shape[0]
    return torch.stack([sum((a_C[n][c] * b_C[n][c]).sum() for n in names) for c in range(count)])  # type: ignore[misc]
