"""Federated averaging: the weighted mean of what the clients sent, exact and in any order.

    change = Σ w_k Δ_k / Σ w_k

References:
    H. Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson and Blaise Agüera y Arcas.
    "Communication-Efficient Learning of Deep Networks from Decentralized Data." AISTATS 2017.
    https://arxiv.org/abs/1602.05629

Legend: C clients.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal, final

from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.server import fixed_point
from lichen.server.fixed_point import FixedSum

__all__ = ["Mean", "MeanTotal", "Weighting", "weigh_C"]

Weighting = Literal["examples", "uniform"]
_WEIGHT_BITS = 30


def weigh_C(message: Message, weighting: Weighting, discount: float) -> Tensor:
    """Each client's weight times ``discount``, rounded to multiples of 2^-30; float64 ``(C,)``.

    ``"uniform"`` takes 1 for every client whose own weight is above 0. Rounding the weight itself,
    before anything is multiplied by it, keeps numerator and denominator consistent.
    """
    weight_C = message.weight_C.detach().cpu().double()
    if weighting == "uniform":
        weight_C = (weight_C > 0).double()
    return (weight_C * discount * 2.0**_WEIGHT_BITS).round() * 2.0**-_WEIGHT_BITS


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MeanTotal:
    """A sum so far.

    Attributes:
        sums: Σ w Δ.
        units: Σ w in units of 2^-30, of unbounded size.
        group: Of the messages; None before the first.
    """

    sums: FixedSum
    units: int = 0
    group: str | None = None


@final
@dataclass(frozen=True, slots=True)
class Mean:
    """The weighted mean of the messages' tensors, whatever their names.

    Args:
        weighting: ``"examples"``: by the messages' weights; ``"uniform"``: every client counts 1. A
            client of weight 0 contributes nothing either way.
        scale: Bits after the point of the exact sums: |Σ w Δ| must stay below ``2^(63 - scale)``.

    Raises:
        LichenError: if the weighting is unknown.
    """

    weighting: Weighting = "examples"
    _: KW_ONLY
    scale: int = 40
    # Without annotations these are constants of the class and not fields.
    linear = True
    keeps = False

    def __post_init__(self) -> None:
        if self.weighting not in ("examples", "uniform"):
            raise LichenError(
                f"unknown weighting {self.weighting!r}", where="aggregator.weighting", fix="use examples or uniform"
            )

    def zero(self) -> MeanTotal:
        """Nothing folded in."""
        return MeanTotal(sums=FixedSum(scale=self.scale))

    def add(self, total: MeanTotal, message: Message, discount: float = 1.0) -> MeanTotal:
        """Fold every client of the message in.

        Raises:
            LichenError: if the group or the tensors differ from those before, a number is not finite,
                or the sum leaves its range.
        """
        weight_C = weigh_C(message, self.weighting, discount)
        sums = fixed_point.add(FixedSum(scale=self.scale), message.tensors, weight_C, client_C=message.client_C)
        if not sums.count:
            return total
        units = sum(int(weight * 2**_WEIGHT_BITS) for weight in weight_C.tolist())
        return self.merge(total, MeanTotal(sums=sums, units=units, group=message.group))

    def merge(self, a: MeanTotal, b: MeanTotal) -> MeanTotal:
        """The sum of two sums.

        Raises:
            LichenError: as :meth:`add`.
        """
        if a.group is None or b.group is None:
            return b if a.group is None else a
        if a.group != b.group:
            raise LichenError(
                f"groups {a.group!r} and {b.group!r} do not average",
                where="aggregator.mean",
                fix="average each group alone",
            )
        return MeanTotal(sums=fixed_point.merge(a.sums, b.sums), units=a.units + b.units, group=a.group)

    def close(self, total: MeanTotal, shared: Tree) -> tuple[Tree, dict[str, float]]:
        """``(change, metrics)``: the mean in the dtype of ``shared`` (float64 for names it lacks).

        Metrics are ``clients`` and ``weight``.

        Raises:
            LichenError: if nothing was folded in, or a shape differs from that in ``shared``.
        """
        if not total.sums.count:
            raise LichenError(
                "no client contributed", where="aggregator.mean", fix="invite more clients or skip the round"
            )
        weight = total.units / 2**_WEIGHT_BITS
        change = {name: x / weight for name, x in fixed_point.read(total.sums).items()}
        for name, x in change.items():
            if name in shared:
                if x.shape != shared[name].shape:
                    raise LichenError(
                        f"tensor {name!r} has shape {tuple(x.shape)}, the model's is {tuple(shared[name].shape)}",
                        where="aggregator.mean",
                        fix="let clients and server load the same recipe",
                    )
                change[name] = x.to(shared[name])
        return change, {"clients": float(total.sums.count), "weight": weight}
