"""Federated averaging: the weighted mean of the messages, exact and order-free.

    change = Σ w_k Δ_k / Σ w_k

References:
    H. Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson and Blaise Agüera y Arcas.
    "Communication-Efficient Learning of Deep Networks from Decentralized Data." AISTATS 2017.
    https://arxiv.org/abs/1602.05629

Legend: C clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, final

from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.server.sums import fixed_point
from lichen.server.sums.fixed_point import WEIGHT_BITS, FixedSum

__all__ = ["Mean", "Summed", "Weighting", "fitted", "weigh_C"]

Weighting = Literal["examples", "uniform"]


def weigh_C(message: Message, weighting: Weighting) -> Tensor:
    """Each client's weight, rounded to multiples of 2^-30; float64 ``(C,)``.

    ``"uniform"`` takes 1 for every client whose own weight is above 0. Rounding the weight itself,
    before anything is multiplied by it, keeps numerator and denominator consistent.
    """
    weight_C = message.weight_C.detach().cpu().double()
    if weighting == "uniform":
        weight_C = (weight_C > 0).double()
    return (weight_C * 2.0**WEIGHT_BITS).round() * 2.0**-WEIGHT_BITS


class Summed(ABC):
    """What aggregators have in common whose total is one exact sum."""

    __slots__ = ()

    @abstractmethod
    def zero(self) -> FixedSum:
        """Nothing folded in."""

    @abstractmethod
    def add(self, total: FixedSum, message: Message) -> FixedSum:
        """Fold every client of the message in."""

    @abstractmethod
    def close(self, total: FixedSum, shared: Tree) -> tuple[Tree, dict[str, float]]:
        """``(change, metrics)``."""

    def merge(self, a: FixedSum, b: FixedSum) -> FixedSum:
        """The sum of two sums; raises as :meth:`add`."""
        return fixed_point.merge(a, b)

    def dump(self, total: FixedSum) -> tuple[Tree, dict[str, Any]]:
        """``(tensors, header)`` of a total."""
        return fixed_point.dump(total)

    def load(self, tensors: Tree, header: Mapping[str, Any]) -> FixedSum:
        """Undo :meth:`dump`; raises as :func:`lichen.server.sums.fixed_point.load`."""
        return fixed_point.load(tensors, header)


@final
@dataclass(frozen=True, slots=True)
class Mean(Summed):
    """The weighted mean of the messages' tensors, whatever their names; a name nobody sent stays as it is.

    So the frozen half of FFA-LoRA, of RoLoRA's round or of FedSA-LoRA needs nothing here: it is not sent.

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

    def __post_init__(self) -> None:
        if self.weighting not in ("examples", "uniform"):
            raise LichenError(
                f"unknown weighting {self.weighting!r}", where="aggregator.weighting", fix="use examples or uniform"
            )

    def zero(self) -> FixedSum:
        """Nothing folded in."""
        return FixedSum(scale=self.scale)

    def add(self, total: FixedSum, message: Message) -> FixedSum:
        """Fold every client of the message in.

        Raises:
            LichenError: if the group or the tensors differ from those before, a number is not finite,
                or the sum leaves its range.
        """
        return fixed_point.add(total, message, weigh_C(message, self.weighting))

    def close(self, total: FixedSum, shared: Tree) -> tuple[Tree, dict[str, float]]:
        """``(change, metrics)``: the mean in the dtype of ``shared`` (float64 for names it lacks).

        Metrics are ``clients`` and ``weight``.

        Raises:
            LichenError: if nothing was folded in, or a shape differs from that in ``shared``.
        """
        if not total.count:
            raise LichenError(
                "no client contributed", where="aggregator.mean", fix="invite more clients or skip the round"
            )
        weight = total.weight / 2**WEIGHT_BITS
        change = fitted({name: x / weight for name, x in fixed_point.read_sums(total).items()}, shared)
        return change, {"clients": float(total.count), "weight": weight}


def fitted(change: Tree, shared: Tree) -> Tree:
    """A change in the dtypes of ``shared``; names that it lacks stay as they are.

    Raises:
        LichenError: if a shape differs.
    """
    for name, x in change.items():
        if name in shared and x.shape != shared[name].shape:
            raise LichenError(
                f"tensor {name!r} has shape {tuple(x.shape)}, the model's is {tuple(shared[name].shape)}",
                where="aggregator",
                fix="let clients and server load the same recipe",
            )
    return {name: x.to(shared[name]) if name in shared else x for name, x in change.items()}
