"""FedBPT's server: averages the clients' CMA-ES states.

Each client sends a normal distribution, diagonal, as :class:`lichen.clients.training.fedbpt.BlackBox` leaves it.
With weights w_k that sum to one, shift d_k of the mean and spread s_k::

    mean ← mean + Σ w_k d_k
    std² ← Σ w_k s_k²  +  between · ( Σ w_k d_k² − (Σ w_k d_k)² )

At ``between = 1`` that is the second moment of the clients' mixture. But along directions that change no
loss a small population strolls at random, farther within a round than it looks; counted in full, the
spread would grow without end, so by default it is the mean of variances alone. Both are sums over
clients: exact, in any order, and fit for secure aggregation. The paper's server instead runs a CMA-ES of its own
over the clients' candidates ranked by loss, which needs every client's message by itself.

References:
    Jingwei Sun, Ziyue Xu, Hongxu Yin, Dong Yang, Daguang Xu, Yudong Liu, Zhixu Du, Yiran Chen and Holger
    R. Roth. "FedBPT: Efficient Federated Black-box Prompt Tuning for Large Language Models." ICML 2024.
    https://arxiv.org/abs/2310.01467

Legend: C clients, D numbers searched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.wire.shared import Shared
from lichen.server.sums import fixed_point
from lichen.server.sums.fixed_point import WEIGHT_BITS, FixedSum
from lichen.server.sums.lifted import Terms
from lichen.server.sums.summed import Summed, Weighting, weigh_C

__all__ = ["Evolution"]


@final
@dataclass(frozen=True, slots=True)
class Evolution(Summed):
    """The clients' normal distributions as one.

    Args:
        weighting: As in :class:`lichen.server.mean.Mean`.
        between: Share of the clients' disagreement that counts as spread, 0 to 1.
        least: No spread falls below it, so that the search never ends before the rounds do.
        most: No spread rises above it.
        scale: Bits after the point of the exact sums.

    Raises:
        LichenError: if a value is out of range.
    """

    weighting: Weighting = "examples"
    _: KW_ONLY
    between: float = 0.0
    least: float = 1e-3
    most: float = 1e3
    scale: int = 36

    def __post_init__(self) -> None:
        if self.weighting not in ("examples", "uniform"):
            raise LichenError(
                f"unknown weighting {self.weighting!r}", where="aggregator.weighting", fix="use examples or uniform"
            )
        if not 0 <= self.between <= 1:
            raise LichenError(f"{self.between} is no share", where="aggregator.between", fix="use 0 to 1")
        if not 1e-4 <= self.least < self.most <= 1e4:
            raise LichenError(
                f"spreads from {self.least} to {self.most}", where="aggregator.least", fix="use 1e-4 <= least < most"
            )

    def zero(self) -> FixedSum:
        """Nothing folded in."""
        return FixedSum(scale=self.scale)

    def terms(self, message: Message, discount_C: Tensor | None) -> Iterator[Terms]:
        """Every client's distribution, as moments.

        Raises:
            LichenError: if the tensors are no ``mean`` and ``std`` of one shape.
        """
        shapes = {name: tuple(x.shape) for name, x in message.tensors.items()}
        if shapes.keys() != {"mean", "std"} or shapes["mean"] != shapes["std"]:
            raise LichenError(
                f"expected mean and std of one shape, got {shapes}",
                where="aggregator.evolution",
                fix="pair Evolution with the work BlackBox",
            )
        shift_CD, std_CD = (message.tensors[name].double() for name in ("mean", "std"))
        tensors = {"mean": shift_CD, "within": std_CD.square()}
        if self.between:
            tensors["square"] = shift_CD.square()
        yield Terms(replace(message, tensors=tensors), weigh_C(message, self.weighting, discount_C))

    def close(self, total: FixedSum, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)``: the shift of ``mean`` and the change of ``std``, in the dtypes of ``shared``.

        Metrics are ``clients``, ``weight``, ``spread`` (root mean square of the new std) and ``apart``
        (the same of the clients' disagreement; only where it is counted).

        Raises:
            LichenError: if nothing was folded in, or ``shared`` holds no distribution of this shape.
        """
        if not total.count:
            raise LichenError("no client contributed", where="aggregator.evolution", fix="invite more clients")
        weight = total.weight / 2**WEIGHT_BITS
        sums = {name: x / weight for name, x in fixed_point.read_sums(total).items()}
        before = shared.trainable
        if any(name not in before or before[name].shape != sums["mean"].shape for name in ("mean", "std")):
            raise LichenError(
                f"the clients' searches have shape {tuple(sums['mean'].shape)}, the server's another",
                where="aggregator.evolution",
                fix="let clients and server load the same recipe",
            )
        metrics = {"clients": float(total.count), "weight": weight}
        variance_D = sums["within"]
        if self.between:
            apart_D = (sums["square"] - sums["mean"].square()).clamp(min=0)
            variance_D = variance_D + self.between * apart_D
            metrics["apart"] = float(apart_D.mean().sqrt())
        std_D = variance_D.clamp(min=0).sqrt().clamp(self.least, self.most)
        metrics["spread"] = float(std_D.square().mean().sqrt())
        change = {
            "mean": sums["mean"].to(before["mean"]),
            "std": (std_D - before["std"].cpu().double()).to(before["std"]),
        }
        return Shared(change), metrics
