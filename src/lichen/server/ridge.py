"""Ridge regression of all clients' rows, from one message each.

    W = (Σ G_k + λ I)^-1 Σ H_k

The sums are exact (:mod:`lichen.server.sums.fixed_point`), so how rows are split over clients, and in which
order or grouping their messages are merged, does not change one byte of W. λ is added once, here, so
none has to be taken out again when statistics of single clients are merged.

References:
    Eros Fanì, Raffaello Camoriano, Barbara Caputo and Marco Ciccone. "Accelerating Heterogeneous
    Federated Learning with Closed-form Classifiers." ICML 2024. https://arxiv.org/abs/2406.01116 (FED3R)
    Run He, Kai Tong, Di Fang, Han Sun, Ziqian Zeng, Haoran Li, Tianyi Chen and Huiping Zhuang. "AFL: A
    Single-Round Analytic Approach for Federated Learning with Pre-trained Models." CVPR 2025.
    https://arxiv.org/abs/2405.16240

Legend: C clients, d features, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.sums import fixed_point
from lichen.server.sums.fixed_point import FixedSum
from lichen.server.sums.lifted import Terms
from lichen.server.sums.summed import Summed, weigh_C

__all__ = ["Ridge", "change_to", "head_of", "statistics_terms"]


@final
@dataclass(frozen=True, slots=True)
class Ridge(Summed):
    """Closed-form head from the statistics of :class:`lichen.clients.statistics.sufficient.Statistics`.

    Args:
        lam: λ > 0, added to the diagonal once.
        bits: Those of the statistics; their sums are then exact.
        bias: The last feature is the constant 1, and becomes ``<head>.bias``; λ applies to it too.
        head: Name of the layer.

    Raises:
        LichenError: if λ is not a positive number.
    """

    lam: float
    _: KW_ONLY
    bits: int = 18
    bias: bool = True
    head: str = "head"

    def __post_init__(self) -> None:
        if not 0 < self.lam < math.inf:
            raise LichenError(f"{self.lam} is not positive", where="aggregator.ridge.lam", fix="use a number > 0")

    def zero(self) -> FixedSum:
        """Nothing folded in."""
        return FixedSum(scale=2 * self.bits)

    def terms(self, message: Message, discount_C: Tensor | None) -> Iterator[Terms]:
        """The statistics of every client with rows; raises as :func:`statistics_terms`."""
        yield statistics_terms(message, discount_C, where="aggregator.ridge")

    def close(self, total: FixedSum, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)``: what is added to ``shared``'s head to become the solution.

        The solution itself, float64, where ``shared`` has no such head yet; over a head of zeros the
        change is the solution in the head's dtype. Metrics are ``clients`` and ``examples``.

        Raises:
            LichenError: if nothing was folded in, or the head in ``shared`` has another shape.
        """
        if not total.count:
            raise LichenError(
                "no client contributed", where="aggregator.ridge", fix="invite clients that have labelled rows"
            )
        sums = fixed_point.read_sums(total)
        solution = head_of(sums, self.lam, bias=self.bias, head=self.head)
        change = change_to(solution, shared.trainable, where="aggregator.ridge")
        return Shared(change), {"clients": float(total.count), "examples": float(sums["n"].sum())}


def statistics_terms(message: Message, discount_C: Tensor | None, *, where: str) -> Terms:
    """``G`` (d, d), ``H`` (d, K) and ``n`` (K,) of every client with rows.

    Raises:
        LichenError: if the tensors are no ridge statistics.
    """
    shapes = {name: tuple(x.shape[1:]) for name, x in message.tensors.items()}
    d, K = shapes.get("H", (0, 0)) if len(shapes.get("H", ())) == 2 else (0, 0)
    if shapes != {"G": (d, d), "H": (d, K), "n": (K,)}:
        raise LichenError(
            f"expected G (d, d), H (d, K) and n (K), got {shapes}", where=where, fix="pair it with the work Statistics"
        )
    return Terms(message, weigh_C(message, "uniform", discount_C))


def change_to(solution: Tree, shared: Tree, *, where: str) -> Tree:
    """What turns ``shared``'s head into the solution; the solution itself where there is none yet.

    Raises:
        LichenError: if the head has another shape.
    """
    change: Tree = {}
    for name, x in solution.items():
        change[name] = x
        if name in shared:
            if shared[name].shape != x.shape:
                raise LichenError(
                    f"{name!r} is {tuple(shared[name].shape)}, the statistics give {tuple(x.shape)}",
                    where=where,
                    fix="use the same features and classes in head and statistics",
                )
            change[name] = (x - shared[name].cpu().double()).to(shared[name])
    return change


def head_of(sums: Tree, lam: float, *, bias: bool = True, head: str = "head") -> Tree:
    """The head that sums ``G`` (d, d) and ``H`` (d, K) make, float64.

    Args:
        sums: Of any rows.
        lam: λ > 0.
        bias: The last feature is the constant 1.
        head: Name of the layer.
    """
    W_dK = _solve(sums["G"], sums["H"], lam)
    solution = {f"{head}.weight": (W_dK[:-1] if bias else W_dK).T.contiguous()}
    return {**solution, f"{head}.bias": W_dK[-1].clone()} if bias else solution


def _solve(G_dd: Tensor, H_dK: Tensor, lam: float) -> Tensor:
    floor = G_dd.shape[0] * torch.finfo(G_dd.dtype).eps * float(G_dd.trace())
    if lam > floor:
        factor_dd, failed = torch.linalg.cholesky_ex(G_dd + lam * torch.eye(G_dd.shape[0], dtype=G_dd.dtype))
        if not int(failed):
            return torch.cholesky_solve(H_dK, factor_dd)
    # λ drowns in the rounding of G. H has no part along directions where G has none, so those are left out.
    values_d, V_dd = torch.linalg.eigh(G_dd)
    inverse_d = torch.where(values_d > floor, 1 / (values_d.clamp(min=floor) + lam), torch.zeros_like(values_d))
    W_dK: Tensor = V_dd @ ((V_dd.T @ H_dK) * inverse_d.unsqueeze(1))
    return W_dK
