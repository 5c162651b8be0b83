"""FLTrust: clients count by how much their changes point where the server's own points.

The server trains on a few rows of its own, from the same tensors and as clients do, which gives its change Δ_0.
A client's trust is t_k = max(0, cos(Δ_k, Δ_0)), and its change is brought to the length of the server's:

    change = Σ t_k (‖Δ_0‖ / ‖Δ_k‖) Δ_k / Σ t_k.

So nobody can shout, and who points the other way is not heard; any number of clients may lie, as far as the server's
rows are like the honest clients'. Where nobody is trusted, the round changes nothing.

References:
    Xiaoyu Cao, Minghong Fang, Jia Liu and Neil Zhenqiang Gong. "FLTrust: Byzantine-robust Federated Learning
    via Trust Bootstrapping." NDSS 2021. https://arxiv.org/abs/2012.13995

Legend: C clients, N numbers of one client.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from math import prod
from typing import final

import torch

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.mean import fitted
from lichen.server.robust import rows
from lichen.server.robust.robust import NO_STEP, OverRows, combine, tree_of
from lichen.server.robust.rows import RowTotal, block_CN, stretches

__all__ = ["FLTrust", "Reference"]

Reference = Callable[[Shared, int], Tree]
"""The server's own change of the tensors that clients send, from shared tensors and their version."""


@final
@dataclass(frozen=True, slots=True)
class FLTrust(OverRows):
    """The mean by trust.

    Args:
        reference: The server's own change, from the shared tensors and the version that clients began from. It
            must depend on these two alone.
        memory: Bytes of rows that lie in memory; more go to a temporary file.
    """

    reference: Reference
    _: KW_ONLY
    memory: int = 2**30

    @property
    def one_version(self) -> bool:
        """Changes are compared to the server's from the same tensors, so none may be old."""
        return True

    def close(self, total: RowTotal, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)``: the change in the dtypes of ``shared``; empty where nobody is trusted.

        Metrics are ``clients``, ``dropped``, those of trust 0, and ``trust``, the mean trust; or ``too_few``.

        Raises:
            LichenError: if nothing was folded in, a client answered twice, messages are of several versions, or
                the server's change has other tensors.
        """
        came = rows.ordered(total)
        versions = sorted({row.version for row in came})
        if len(versions) > 1:
            raise LichenError(
                f"changes from versions {versions[0]} and {versions[-1]} are not from the same tensors",
                where="aggregator.fltrust",
                fix="set schedule.kind: synchronous",
            )
        own = self.reference(shared, versions[0])
        like = {name: torch.empty(shape, device="meta") for name, shape in total.layout}
        trees.check_same(own, like, where="aggregator.fltrust.reference")
        own_N = torch.cat([own[name].detach().reshape(-1).cpu().double() for name, _ in total.layout])
        size = sum(prod(shape) for _, shape in total.layout)
        inner_C, square_C = torch.zeros(len(came)).double(), torch.zeros(len(came)).double()
        for first, last in stretches([(0, size)], len(came)):
            x_CN = block_CN(came, (first, last))
            inner_C += x_CN @ own_N[first:last]
            square_C += x_CN.square().sum(1)
        length, norm_C = own_N.norm(), square_C.sqrt()
        scale_C = norm_C * length
        trust_C = torch.where(scale_C > 0, inner_C / scale_C, 0.0).clamp(min=0)
        metrics = {"clients": float(len(came)), "dropped": float((trust_C == 0).sum()), "trust": float(trust_C.mean())}
        if not bool(trust_C.sum() > 0):
            return Shared(), {**metrics, NO_STEP: 1.0}
        out_N = torch.empty(size, dtype=torch.float64)
        factor_C = torch.where(trust_C > 0, trust_C / trust_C.sum() * length / norm_C, 0.0)
        combine(came, factor_C, [(0, size)], out_N)
        return Shared(fitted(tree_of(out_N, total.layout), shared.trainable)), metrics
