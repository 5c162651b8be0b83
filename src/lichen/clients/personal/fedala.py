"""FedALA: each client learns, number by number, how much of the shared model its next round starts from.

A client keeps the tensors l that its last round has ended with. When the shared tensors g arrive, its training starts
at ``l + (g - l) * W``: W has a number from 0 to 1 for each one of g's, begins at 1, and is learned on the client's rows
by ``W <- clip(W - rate * grad * (g - l), 0, 1)`` before the first step. Only the top layers have a W; those below start
at g. What the client trains from there is its own model, and its difference from g is sent.

The paper draws four fifths of a client's rows for W, and at first goes on until the loss settles. Here W takes some
steps on the round's first batch, so that a round looks at no more rows than others' do.

References:
    Jianqing Zhang, Yang Hua, Hao Wang, Tao Song, Zhengui Xue, Ruhui Ma and Haibing Guan. "FedALA: Adaptive
    Local Aggregation for Personalized Federated Learning." AAAI 2023. https://arxiv.org/abs/2212.01197

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from lichen.clients.training.gradient_steps import GradientChain
from lichen.clients.training.train import Train, TrainState
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch
from lichen.core.message import Job
from lichen.core.tree import Tree

__all__ = ["FedAla"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FedAlaState:
    """What clients have kept, empty at their first time; and whether this round's start was learned."""

    last_C: Tree
    weights_C: Tree
    learned: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FedAla:
    """FedALA as a :class:`lichen.clients.personal.training.PersonalMethod`, beside plain training.

    Args:
        layers: Top layers whose start is learned; what lies above all layers is learned with them.
        steps: Steps of W in a round.
        rate: Their learning rate; 0: W stays 1, and the start is the shared model.
    """

    layers: int
    steps: int
    rate: float

    def init(
        self, train: Train, job: Job, clients: Sequence[int], mine_C: Tree, shared: TrainState
    ) -> tuple[FedAlaState, Any]:
        """What the clients have kept, as far as this round trains it.

        Raises:
            LichenError: if it does not fit the shared tensors.
        """
        last_C, weights_C = (trees.split(mine_C, prefix)[0] for prefix in ("params/", "weights/"))
        known_C = {name: x_C for name, x_C in last_C.items() if name in shared.shared_C}
        trees.check_same(known_C, {name: shared.shared_C[name] for name in known_C}, where="private state")
        return FedAlaState(last_C=last_C, weights_C=weights_C), shared

    def step(self, train: Train, own: FedAlaState, shared: TrainState, batch: Batch) -> tuple[FedAlaState, TrainState]:
        """Before the first step of a round, the start."""
        if own.learned or not own.last_C:
            return replace(own, learned=True), shared
        g_C = shared.shared_C
        some = [name for name in _top(g_C, self.layers) if name in own.last_C]
        apart_C = {name: own.last_C[name].to(g_C[name]) - g_C[name] for name in some}
        weights_C = {name: own.weights_C.get(name, torch.ones_like(x_C)) for name, x_C in apart_C.items()}
        for _ in range(self.steps):
            leaves_C = {name: x_C.detach().requires_grad_() for name, x_C in _start(g_C, apart_C, weights_C).items()}
            with torch.enable_grad():
                loss_C, count_C = train.model.loss({**leaves_C, **shared.frozen_C}, shared.fixed, batch)
                mean = (loss_C / count_C.clamp(min=1)).sum()
                grads = torch.autograd.grad(
                    mean, [leaves_C[name] for name in some], allow_unused=True, materialize_grads=True
                )
            for name, grad in zip(some, grads, strict=True):
                moved_C = (weights_C[name] + self.rate * grad * apart_C[name]).clamp(0, 1)
                weights_C[name] = torch.where(moved_C.isfinite(), moved_C, weights_C[name])
        start_C = _start(g_C, apart_C, weights_C)
        chain = GradientChain(train.gradient_steps).init(shared.job, shared.clients, start_C, shared.own)
        started = replace(shared, initial_C=start_C, params_C=start_C, chain=chain)
        return replace(own, weights_C={**own.weights_C, **weights_C}, learned=True), started

    def final(self, own: FedAlaState, shared: TrainState, finite_C: Tensor) -> Tree:
        """What training has ended with, and W."""
        last_C = {
            name: torch.where(_per(finite_C, x_C), x_C, own.last_C.get(name, shared.shared_C[name]))
            for name, x_C in shared.params_C.items()
        }
        return trees.join("params/", {**own.last_C, **last_C}, trees.join("weights/", own.weights_C, {}))

    def model(self, shared: Tree, mine_C: Tree) -> Tree:
        """What training has ended with."""
        return trees.split(mine_C, "params/")[0]


def _start(g_C: Tree, apart_C: Tree, weights_C: Tree) -> Tree:
    """``l + (g - l) W``, written so that it has g's bits where W is 1."""
    return {name: x_C + apart_C[name] * (1 - weights_C[name]) if name in apart_C else x_C for name, x_C in g_C.items()}


def _top(names: Iterable[str], layers: int) -> list[str]:
    """The tensors of the last layers, and of what comes after all layers."""
    block = {name: trees.block_of(name) for name in names}
    last = max((at for at in block.values() if at is not None), default=-1)
    return [name for name, at in block.items() if (at > last - layers if at is not None else "embed" not in name)]


def _per(flag_C: Tensor, x_C: Tensor) -> Tensor:
    return flag_C.to(x_C.device).view(-1, *[1] * (x_C.dim() - 1))
