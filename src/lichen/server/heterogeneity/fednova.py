"""FedNova at the server: the mean of changes by reach, times the mean reach.

    θ <- θ + (Σ p_k a_k) Σ p_k Δ_k / a_k

with p_k the clients' weights, which add up to 1, Δ_k their changes and a_k how far their steps reach
(:mod:`lichen.core.conventions.reach`). Where all reach as far it is FedAvg. A client of no step has no
weight.

References:
    Jianyu Wang, Qinghua Liu, Hao Liang, Gauri Joshi and H. Vincent Poor. "Tackling the Objective Inconsistency Problem
    in Heterogeneous Federated Optimization." NeurIPS 2020. https://arxiv.org/abs/2007.07481 (section 4)

Legend: C clients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import torch

from lichen.core import tree as trees
from lichen.core.contracts.server import Aggregator
from lichen.core.conventions.reach import REACH
from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.wire.shared import Shared
from lichen.core.wrapping import AroundAggregator

__all__ = ["normalized"]


def normalized(inner: Aggregator) -> Aggregator:
    """A mean of changes that are evened out by how far their clients' steps reach.

    Args:
        inner: The mean; its weights are p_k.
    """
    return _Normalized(inner)


@final
@dataclass(frozen=True, slots=True)
class _Normalized(AroundAggregator):
    """Changes over their reach, and the reach beside them."""

    def before(self, message: Message) -> Message:
        """Each client's change over its reach.

        Raises:
            LichenError: if a client does not say how far it reaches, or not by a number that can be.
        """
        reach_C1 = message.tensors.get(REACH)
        if reach_C1 is None or reach_C1.shape != (len(message.client_C), 1):
            fix = "let clients and server load the same recipe"
            raise LichenError(f"tensor {REACH!r} did not come", where="aggregator.fednova", fix=fix)
        counts_C = message.weight_C.to(reach_C1.device) > 0
        good_C = reach_C1[:, 0].isfinite() & (reach_C1[:, 0] > 0)
        if bool((counts_C & ~good_C).any()):
            client = int(message.client_C[(counts_C & ~good_C).nonzero()[0, 0].cpu()])
            fix = "let it train by this recipe, or leave it out"
            raise LichenError("its steps reach nowhere", where=f"message of client {client}", fix=fix)
        by_C = torch.where(good_C, reach_C1[:, 0], torch.ones_like(reach_C1[:, 0]))
        tensors = {
            name: x_C if name == REACH else (x_C.double() / by_C.view(-1, *[1] * (x_C.dim() - 1))).to(x_C)
            for name, x_C in message.tensors.items()
        }
        return replace(message, tensors=tensors)

    def close(self, total: Any, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """The change and, as ``reach``, the mean reach; raises as the inner one."""
        change, metrics = self.inner.close(total, shared)
        tensors = dict(change.trainable)
        mean = float(tensors.pop(REACH))
        return replace(change, trainable=trees.scale(tensors, mean)), {**metrics, "reach": mean}
