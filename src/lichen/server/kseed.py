"""FedKSeed's server: averages seed-scalar pairs by direction.

    change_s = round(Σ_k w_k G_k,s / Σ_k w_k)          in units of 2^-bits

where G_k,s sums the slopes client k found along direction s, none where it never went there. Sums are
exact (:mod:`lichen.server.sums.fixed_point`) and rounded once to whole units, so that the shared sums remain
integers: every node rebuilds the same model from them (:mod:`lichen.clients.training.kseed`).

A message is unfolded to K numbers before it is added, and only sums of those are used. So a lifted message
holds the K numbers: under masks its choice of directions does not show, as it would in the pairs.

References:
    Zhen Qin, Daoyuan Chen, Bingchen Qian, Bolin Ding, Yaliang Li and Shuiguang Deng. "Federated
    Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18 Kilobytes."
    ICML 2024. https://arxiv.org/abs/2312.06353

Legend: C clients, K directions, t steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.sums import fixed_point
from lichen.server.sums.fixed_point import WEIGHT_BITS, FixedSum
from lichen.server.sums.lifted import Terms
from lichen.server.sums.summed import Summed, Weighting, weigh_C

__all__ = ["KSeedOptimizer", "SeedSums"]

_SUMS, _INDEX, _UNITS = "kseed.sums", "kseed.index", "kseed.units"
_SCALE = 30


@final
@dataclass(frozen=True, slots=True)
class SeedSums(Summed):
    """The weighted mean of the clients' slopes, direction by direction.

    Args:
        count: K.
        bits: Slopes are multiples of ``2^-bits``; the clients must use the same.
        weighting: As in :class:`lichen.server.mean.Mean`.

    Raises:
        LichenError: if a value is out of range.
    """

    count: int
    _: KW_ONLY
    bits: int = 16
    weighting: Weighting = "examples"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise LichenError(f"{self.count} directions", where="aggregator.kseed.count", fix="use 1024 to 4096")
        if self.weighting not in ("examples", "uniform"):
            raise LichenError(
                f"unknown weighting {self.weighting!r}", where="aggregator.weighting", fix="use examples or uniform"
            )

    def zero(self) -> FixedSum:
        """Nothing folded in."""
        return FixedSum(scale=_SCALE)

    def terms(self, message: Message, discount_C: Tensor | None) -> Iterator[Terms]:
        """The slopes of every client, direction by direction.

        Raises:
            LichenError: if the tensors are no pairs, or an index is no direction.
        """
        weight_C = weigh_C(message, self.weighting, discount_C)
        yield Terms(replace(message, tensors={_SUMS: self._dense(message, weight_C)}), weight_C)

    def _dense(self, message: Message, weight_C: Tensor) -> Tensor:
        """Each client's slopes by direction, float64 ``(C, K)``; zeros for clients of no weight."""
        index, units = message.tensors.get(_INDEX), message.tensors.get(_UNITS)
        if (
            index is None
            or units is None
            or len(message.tensors) != 2
            or index.dim() != 2
            or index.shape != units.shape
            or index.is_floating_point()
            or units.is_floating_point()
        ):
            raise LichenError(
                f"expected {_INDEX!r} and {_UNITS!r} of one shape (C, steps), got {sorted(message.tensors)}",
                where="aggregator.kseed",
                fix="pair SeedSums with the work FedKSeed",
            )
        counted_C1 = (weight_C > 0)[:, None]
        index_Ct = torch.where(counted_C1, index.cpu().long(), -1)
        units_Ct = torch.where(index_Ct == -1, 0, units.cpu().long())
        wrong_Ct = (index_Ct < -1) | (index_Ct >= self.count)
        if bool(wrong_Ct.any()):
            client = int(wrong_Ct.any(1).nonzero()[0])
            raise LichenError(
                f"there is no direction {int(index_Ct[wrong_Ct][0])} among {self.count}",
                where=f"message of client {int(message.client_C[client])}",
                fix="let clients and server load the same recipe",
            )
        dense_CK = torch.zeros(index_Ct.shape[0], self.count, dtype=torch.int64)
        return dense_CK.scatter_add_(1, index_Ct.clamp(min=0), units_Ct).double() * 2.0**-self.bits

    def close(self, total: FixedSum, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)``: the mean in whole units, int32 ``(K,)``.

        Metrics are ``clients``, ``weight``, and ``directions``: how many of the K were gone along.

        Raises:
            LichenError: if nothing was folded in, or ``shared`` has another number of directions.
        """
        if not total.count:
            raise LichenError(
                "no client contributed", where="aggregator.kseed", fix="invite more clients or skip the round"
            )
        before = shared.trainable
        if _SUMS in before and before[_SUMS].shape != (self.count,):
            raise LichenError(
                f"the model has {tuple(before[_SUMS].shape)} directions, the server {self.count}",
                where="aggregator.kseed.count",
                fix="let clients and server load the same recipe",
            )
        weight = total.weight / 2**WEIGHT_BITS
        mean_K = (fixed_point.read_sums(total)[_SUMS] / weight * 2.0**self.bits).round()
        moved = float((mean_K != 0).sum())
        change = {_SUMS: _whole(mean_K.to(torch.int64))}
        return Shared(change), {"clients": float(total.count), "weight": weight, "directions": moved}


@final
@dataclass(frozen=True, slots=True)
class KSeedOptimizer:
    """The server's step: whole units are added to whole units, and none is rounded away.

    A learning rate has no place here: the clients know theirs, and it is the run's.
    """

    def init(self, shared: Shared) -> Tree:
        """No state."""
        return {}

    def update(self, change: Shared, state: Tree, shared: Shared) -> tuple[Shared, Tree]:
        """``(shared, state)`` with the change in the sums.

        Raises:
            LichenError: if the change is not of the shared sums, or a sum leaves 32 bits.
        """
        before, step = shared.trainable, change.trainable
        if step.keys() != {_SUMS} or _SUMS not in before or before[_SUMS].shape != step[_SUMS].shape:
            raise LichenError(
                f"the change {sorted(step)} does not fit the seed sums",
                where="server optimizer",
                fix="pair KSeedOptimizer with the aggregator SeedSums",
            )
        new_K = before[_SUMS].to(torch.int64) + step[_SUMS].to(before[_SUMS].device).to(torch.int64)
        return shared | Shared({_SUMS: _whole(new_K)}), state


def _whole(units_K: Tensor) -> Tensor:
    """As int32.

    Raises:
        LichenError: if a sum does not fit.
    """
    if bool((units_K.abs() >= 2**31).any()):
        raise LichenError(
            "the slopes along a direction sum to more than 32 bits", where="kseed", fix="lower bits, or the clip"
        )
    return units_K.to(torch.int32)
