"""What aggregators have in common whose total is one exact sum, and how clients are weighed.

Their :meth:`Summed.add` is two halves. ``lift`` weighs and rounds one message by itself, and so may run where
the message is made, under masks; what is left is to add integers. A raw message goes through both halves in
one pass, and the bytes are the same.

Legend: C clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from lichen.core.contracts.server import Needs
from lichen.core.errors import LichenError
from lichen.core.message import Message, is_lifted
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.sums import fixed_point, lifted
from lichen.server.sums.fixed_point import WEIGHT_BITS, FixedSum
from lichen.server.sums.lifted import Terms

__all__ = ["Summed", "Weighting", "weigh_C"]

Weighting = Literal["examples", "uniform"]


def weigh_C(message: Message, weighting: Weighting, discount_C: Tensor | None = None) -> Tensor:
    """Each client's weight, rounded to multiples of 2^-30; float64 ``(C,)``.

    ``"uniform"`` takes 1 for every client whose own weight is above 0. Rounding the weight itself,
    before anything is multiplied by it, keeps numerator and denominator consistent.

    Args:
        message: Brings the weights.
        weighting: What becomes of them.
        discount_C: What each weight is then multiplied by, from 0 to 1; None: by nothing.

    Raises:
        LichenError: if a weight is not a number, as that of a lifted message, or a discount out of range.
    """
    weight_C = message.weight_C.detach().cpu().double()
    if bool(weight_C.isnan().any()):
        client = int(message.client_C[weight_C.isnan().nonzero()[0, 0]])
        raise LichenError("weight nan is not a finite number >= 0", where=f"message of client {client}")
    if weighting == "uniform":
        weight_C = (weight_C > 0).double()
    if discount_C is not None:
        discount_C = discount_C.detach().cpu().double()
        if discount_C.shape != weight_C.shape or not bool(((discount_C >= 0) & (discount_C <= 1)).all()):
            raise LichenError(
                f"discounts {discount_C.tolist()} of {len(weight_C)} clients are not each from 0 to 1",
                where="aggregator.discount",
                fix="use a factor that falls with age from 1 to 0",
            )
        weight_C = weight_C * discount_C
    return (weight_C * 2.0**WEIGHT_BITS).round() * 2.0**-WEIGHT_BITS


class Summed(ABC):
    """An aggregator that closes one exact sum: a member says what is summed of a client, and what becomes of it."""

    __slots__ = ()
    needs: ClassVar[Needs] = "sum"
    one_version: ClassVar[bool] = False

    @abstractmethod
    def zero(self) -> FixedSum:
        """Nothing folded in."""

    @abstractmethod
    def terms(self, message: Message, discount_C: Tensor | None) -> Iterator[Terms]:
        """What is summed of each client, in order; in parts, where all at once would take too much memory."""

    @abstractmethod
    def close(self, total: FixedSum, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)``."""

    def lift(self, message: Message, discount_C: Tensor | None = None) -> Message:
        """The message weighed and rounded, as :mod:`lichen.server.sums.lifted` describes it.

        Raises:
            LichenError: as :meth:`add`, or if a number is past the limit of a lifted one.
        """
        return lifted.lift(message, self.terms(message, discount_C), self.zero())

    def add(self, total: FixedSum, message: Message, discount_C: Tensor | None = None) -> FixedSum:
        """Fold every client of the message in, raw or lifted.

        Raises:
            LichenError: if the message is none of this aggregator's, group or tensors differ from those
                before, a number is not finite, the sum leaves its range, or a lifted message, which is
                weighed already, is to be discounted.
        """
        if is_lifted(message):
            if discount_C is not None:
                raise LichenError(
                    "a lifted message is weighed already", where="aggregator.discount", fix="discount it in lift"
                )
            return lifted.add(total, message)
        for part in self.terms(message, discount_C):
            total = fixed_point.add(total, part.message, part.weight_C, part.factor_C)
        return total

    def clients(self, total: FixedSum) -> int:
        """Clients folded in."""
        return total.count

    def merge(self, a: FixedSum, b: FixedSum) -> FixedSum:
        """The sum of two sums; raises as :meth:`add`."""
        return fixed_point.merge(a, b)

    def dump(self, total: FixedSum) -> tuple[Tree, dict[str, Any]]:
        """``(tensors, header)`` of a total."""
        return fixed_point.dump(total)

    def load(self, tensors: Tree, header: Mapping[str, Any]) -> FixedSum:
        """Undo :meth:`dump`; raises as :func:`lichen.server.sums.fixed_point.load`."""
        return fixed_point.load(tensors, header)
