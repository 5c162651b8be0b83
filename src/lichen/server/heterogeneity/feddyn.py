"""FedDyn at the server: the mean of the clients' models, less how far all clients' changes together still point.

    u <- u - |P|/N mean_k (θ_k - θ),    θ <- θ + mean_k (θ_k - θ) - u

with the mean over the clients P of the round, each alike, and N clients on the roster. The paper's h is α u. The
clients' half is :mod:`lichen.clients.training.corrections.feddyn`.

References:
    Durmus Alp Emre Acar, Yue Zhao, Ramon Matas Navarro, Matthew Mattina, Paul N. Whatmough and Venkatesh Saligrama.
    "Federated Learning Based on Dynamic Regularization." ICLR 2021. https://arxiv.org/abs/2111.04263 (algorithm 1)
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, final

import torch

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.core.wrapping import AroundAggregator
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD

__all__ = ["ServerFedDyn", "dynamic_mean"]

SHARE = "feddyn.share"
"""A number beside the mean: |P|/N. The server's step reads it, and it goes nowhere else."""


def dynamic_mean(*, clients: int) -> AroundAggregator:
    """The mean of the clients' changes, each alike, and beside it which share of the roster came.

    Args:
        clients: N, the clients of the roster.
    """
    return _DynamicMean(Mean("uniform"), roster=clients)


@final
@dataclass(frozen=True, slots=True)
class _DynamicMean(AroundAggregator):
    """The inner mean, with the share of the roster that came."""

    _: KW_ONLY
    roster: int

    @property
    def one_version(self) -> bool:
        """A client's regularizer pulls to the model that it was sent."""
        return True

    def before(self, message: Message) -> Message:
        """The message itself."""
        return message

    def close(self, total: Any, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """The mean and the share; raises as the inner one."""
        change, metrics = self.inner.close(total, shared)
        share = torch.tensor(self.inner.clients(total) / self.roster, dtype=torch.float64)
        return change | Shared(frozen={SHARE: share}), metrics


@final
@dataclass(frozen=True, slots=True)
class ServerFedDyn:
    """FedDyn's step with the mean change; a :class:`lichen.core.contracts.server.ServerOptimizer`."""

    def init(self, shared: Shared) -> Tree:
        """u, zero."""
        return trees.join("u/", trees.zeros_like(shared.trainable), {})

    def update(self, change: Shared, state: Tree, shared: Shared) -> tuple[Shared, Tree]:
        """``(shared, state)`` after one step.

        Raises:
            LichenError: if the change is another rule's, or does not fit ``shared``.
        """
        share = change.frozen.get(SHARE)
        if share is None:
            fix = "pair ServerFedDyn with dynamic_mean"
            raise LichenError("the change does not say how many came", where="server optimizer", fix=fix)
        u, steps = dict(trees.split(state, "u/")[0]), dict[str, Any]()
        for name, x in change.trainable.items():
            if name not in u or u[name].shape != x.shape:
                fix = "let clients and server load the same recipe"
                what = f"the change's tensor {name!r} of shape {tuple(x.shape)} does not fit the shared model"
                raise LichenError(what, where="server optimizer", fix=fix)
            mean = x.to(u[name])
            u[name] = u[name] - float(share) * mean
            steps[name] = mean - u[name]
        frozen = {name: x for name, x in change.frozen.items() if name != SHARE}
        after, _ = ServerSGD().update(Shared(steps, patch=change.patch, frozen=frozen), {}, shared)
        return after, trees.join("u/", u, {})
