"""A client method in one file: FedProx whose pull each client adapts to its own loss.

    Tian Li, Anit Kumar Sahu, Manzil Zaheer, Maziar Sanjabi, Ameet Talwalkar and Virginia Smith. "Federated
    Optimization in Heterogeneous Networks." MLSys 2020. https://arxiv.org/abs/1812.06127 (section 5.3.2: the pull grows
    by 0.1 when the loss grows, and shrinks by 0.1 when it shrinks; there one pull for all, here one for each client)

A package that brings it names it by an entry point, and a recipe by ``optimizer.name: adaptive_prox``::

    [project.entry-points."lichen.client_methods"]
    adaptive_prox = "client_method:METHOD"

Legend: C clients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from lichen.clients.method import ClientMethod, ClientSettings, Works
from lichen.clients.training.gradient_steps import Stateless
from lichen.clients.training.train import Train
from lichen.core.contracts.model import Batch
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.declared import Paper, Property

STEP = 0.1
PULL, LOSS = "adaptive_prox/pull", "adaptive_prox/loss"
"""Names in the private state: how strongly each client is pulled, and its loss when it was last here."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Pull(Stateless):
    """A gradient step: draws each client to the shared tensors by its own ``pull_C``."""

    shared: Tree
    pull_C: Tensor

    @property
    def name(self) -> str:
        """``pull``."""
        return "pull"

    def update(self, grads_C: Tree, state: Tree, params_C: Tree, *, active_C: Tensor, exact: bool) -> tuple[Tree, Tree]:
        """The gradients, each with its pull added."""
        pulled_C: Tree = {}
        for name, g_C in grads_C.items():
            column_C = self.pull_C.to(g_C).view(-1, *[1] * (g_C.dim() - 1))
            pulled_C[name] = g_C + column_C * (params_C[name] - self.shared[name])
        return pulled_C, state


@final
@dataclass(frozen=True, slots=True)
class AdaptiveProx:
    """Local training with a pull of each client's own.

    Args:
        inner: The recipe's local training.
    """

    inner: Train

    def expected(self, job: Job) -> Expected:
        """The message of local training: the pull stays with its client."""
        return self.inner.expected(job)

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> tuple[Train, Any, Tree]:
        """Clients at the shared tensors, with the pull that they have kept; 0 at their first time."""
        own_C = own_C or {name: torch.zeros(len(clients), dtype=torch.float64) for name in (PULL, LOSS)}
        pull = Pull(job.shared.trainable, own_C[PULL])
        train = replace(self.inner, gradient_steps=(*self.inner.gradient_steps, pull))
        return train, train.init(job, clients, None), own_C

    def step(self, state: tuple[Train, Any, Tree], batch: Batch) -> tuple[Train, Any, Tree]:
        """One step of every active client."""
        train, inner, own_C = state
        return train, train.step(inner, batch), own_C

    def final(self, state: tuple[Train, Any, Tree]) -> tuple[Message, Tree | None]:
        """The message of local training; the pull grows where the loss has grown, and shrinks where it has shrunk."""
        train, inner, own_C = state
        message, _ = train.final(inner)
        loss_C = (message.metrics["loss_sum"] / message.metrics["count"].clamp(min=1)).double()
        before_C = own_C[LOSS].to(loss_C)
        grown_C = torch.where(before_C > 0, torch.sign(loss_C - before_C), torch.zeros_like(loss_C))
        pull_C = (own_C[PULL].to(loss_C) + STEP * grown_C).clamp(min=0)
        return message, {PULL: pull_C, LOSS: loss_C}


def works(settings: ClientSettings) -> Works:
    """What a client does in a round."""
    return Works(AdaptiveProx(settings.train))


METHOD = ClientMethod(
    name="adaptive_prox",
    summary="FedProx whose pull each client adapts to its own loss",
    works=works,
    papers=(Paper(short="Li et al. MLSys 2020", url="https://arxiv.org/abs/1812.06127"),),
    allows=frozenset(
        {Property.GRADIENTS, Property.SERVER_STEP, Property.CODECS, Property.EPOCHS, Property.ACCUMULATION}
    ),
    base="sgd",
)
