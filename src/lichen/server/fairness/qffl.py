"""q-FFL: clients count by the q-th power of their loss, with the step length that this allows.

    Δ = Σ F_k^q δ_k / Σ F_k^q (1 + q ‖δ_k‖² / (η F_k))

q = 0 is the uniform mean, a growing q leans towards the worst client. F_k is what a client's message reports: its mean
loss over the rows of its local steps; δ_k is what it sends. Both are exact sums
(:mod:`lichen.server.sums.fixed_point`). What a client adds follows from its own loss and norm alone, so the rule needs
sums only: under masks clients make these numbers themselves.

References:
    Tian Li, Maziar Sanjabi, Ahmad Beirami and Virginia Smith. "Fair Resource Allocation in Federated
    Learning." ICLR 2020. https://arxiv.org/abs/1905.10497 (q-FedAvg)

Legend: C clients of a message.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.wire.shared import Shared
from lichen.server.fairness.losses import losses_of, nobody
from lichen.server.mean import fitted
from lichen.server.sums import fixed_point
from lichen.server.sums.fixed_point import WEIGHT_BITS, FixedSum
from lichen.server.sums.lifted import Terms
from lichen.server.sums.summed import Summed, Weighting, weigh_C

__all__ = ["QFFL"]

_LEAST = 2.0**-WEIGHT_BITS


@final
@dataclass(frozen=True, slots=True)
class QFFL(Summed):
    """q-FedAvg.

    Args:
        q: How much the loss counts, 0 or more; 0 is the mean, from 5 on only the worst are seen.
        lr: η, the clients' learning rate; 1/η stands for the Lipschitz constant of their gradients.
        weighting: What clients count before their loss: each 1 (``"uniform"``), or by examples.
        scale: Bits after the point of the exact sums.

    Raises:
        LichenError: if a number is out of range.
    """

    q: float
    _: KW_ONLY
    lr: float
    weighting: Weighting = "uniform"
    scale: int = 40
    one_version: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.q < math.inf:
            raise LichenError(f"{self.q} is out of range", where="aggregator.q", fix="use a number >= 0, such as 1")
        if not 0 < self.lr < math.inf:
            raise LichenError(f"{self.lr} is not positive", where="aggregator.lr", fix="give the clients' rate")
        if self.weighting not in ("examples", "uniform"):
            raise LichenError(
                f"unknown weighting {self.weighting!r}", where="aggregator.weighting", fix="use examples or uniform"
            )

    def zero(self) -> FixedSum:
        """Nothing folded in."""
        return FixedSum(scale=self.scale)

    def terms(self, message: Message, discount_C: Tensor | None) -> Iterator[Terms]:
        """Every client's tensors, weighed by its loss, and its part of the divisor.

        Raises:
            LichenError: if a loss is missing or not finite.
        """
        weight_C = weigh_C(message, self.weighting, discount_C)
        # A loss of 0 asks for nothing; a little more than that keeps its client in the sum.
        losses = [max(loss, 1e-6) for loss in losses_of(message, weight_C)]
        factor_C = torch.tensor([loss**self.q for loss in losses], dtype=torch.float64)
        rounded_C = (weight_C * factor_C * 2.0**WEIGHT_BITS).round() * _LEAST
        fair_C = torch.where(weight_C > 0, rounded_C.clamp(min=_LEAST), 0.0)
        square_C = trees.norm_C({name: x.cpu().double() for name, x in message.tensors.items()}).square()
        curve_C = 1 + self.q * square_C / (self.lr * torch.tensor(losses, dtype=torch.float64))
        device = next(iter(message.tensors.values())).device
        weighted = {**message.tensors, "fair.curve": curve_C.to(device)}
        yield Terms(replace(message, tensors=weighted), fair_C)

    def close(self, total: FixedSum, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)``: Δ in the dtypes of ``shared``; metrics ``clients`` and ``curve``, the mean divisor.

        Raises:
            LichenError: if nothing was folded in, or a shape differs from that in ``shared``.
        """
        if not total.count:
            raise nobody()
        sums = fixed_point.read_sums(total)
        divisor = float(sums.pop("fair.curve"))
        change = fitted({name: x / divisor for name, x in sums.items()}, shared.trainable)
        return Shared(change), {"clients": float(total.count), "curve": divisor / (total.weight / 2**WEIGHT_BITS)}
