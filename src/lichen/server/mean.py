"""Federated averaging: the weighted mean of the messages, exact and order-free.

    change = Σ w_k Δ_k / Σ w_k

Where messages come late, an asynchronous schedule discounts each by its age: s_k in [0, 1], such as
(1 + age)^(-1/2), multiplies w_k. What the sum is divided by is then a choice, and ``divisor`` makes it:

    "discounted"    Σ s_k w_k Δ_k / Σ s_k w_k    a mean; what is late counts less beside what is fresh
    "plain"         Σ s_k w_k Δ_k / Σ w_k        a round of late messages also makes a shorter step
    a number n      Σ s_k w_k Δ_k / n

FedBuff's server with its staleness scaling is ``Mean("uniform", divisor="plain")``: the
discounted changes, over the number K of those that arrived. A number serves where the mean is over clients
that did not all come: SCAFFOLD's server adds |S|/N of the mean change of the control variates, which is
their sum over the N clients of the roster, ``Mean("uniform", divisor=N)``.

References:
    H. Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson and Blaise Agüera y Arcas.
    "Communication-Efficient Learning of Deep Networks from Decentralized Data." AISTATS 2017.
    https://arxiv.org/abs/1602.05629
    John Nguyen, Kshitiz Malik, Hongyuan Zhan, Ashkan Yousefpour, Michael Rabbat, Mani Malek and Dzmitry
    Huba. "Federated Learning with Buffered Asynchronous Aggregation." AISTATS 2022.
    https://arxiv.org/abs/2106.06639 (FedBuff)
    Sai Praneeth Karimireddy, Satyen Kale, Mehryar Mohri, Sashank J. Reddi, Sebastian U. Stich and Ananda
    Theertha Suresh. "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning." ICML 2020.
    https://arxiv.org/abs/1910.06378

Legend: C clients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Literal, final

from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.sums import fixed_point
from lichen.server.sums.fixed_point import WEIGHT_BITS, FixedSum
from lichen.server.sums.lifted import Terms
from lichen.server.sums.summed import Summed, Weighting, weigh_C

__all__ = ["Mean", "fitted"]


@final
@dataclass(frozen=True, slots=True)
class Mean(Summed):
    """The weighted mean of the messages' tensors, whatever their names; a name nobody sent stays as it is.

    So the frozen half of FFA-LoRA, of RoLoRA's round or of FedSA-LoRA needs nothing here: it is not sent.

    Args:
        weighting: ``"examples"``: by the messages' weights; ``"uniform"``: every client counts 1. A
            client of weight 0 contributes nothing either way.
        divisor: What the sum is divided by: the discounted weights, the plain ones, or a number.
        scale: Bits after the point of the exact sums: |Σ w Δ| must stay below ``2^(63 - scale)``.
        lift_bits: A lifted client's |w Δ| stays below ``2^(lift_bits - scale)``, and ``2^(63 - lift_bits)``
            clients fit into one sum.

    Raises:
        LichenError: if the weighting or divisor is unknown, or the bits do not fit 64.
    """

    weighting: Weighting = "examples"
    _: KW_ONLY
    divisor: Literal["discounted", "plain"] | float = "discounted"
    scale: int = 40
    lift_bits: int = 52

    def __post_init__(self) -> None:
        if self.weighting not in ("examples", "uniform"):
            raise LichenError(
                f"unknown weighting {self.weighting!r}", where="aggregator.weighting", fix="use examples or uniform"
            )
        known = self.divisor in ("discounted", "plain")
        if not known and (isinstance(self.divisor, str) or not 0 < self.divisor < math.inf):
            raise LichenError(
                f"no divisor {self.divisor!r}", where="aggregator.divisor", fix="use discounted, plain, or a number > 0"
            )
        if not 0 < self.lift_bits < 63:
            raise LichenError(f"{self.lift_bits} bits", where="aggregator.lift_bits", fix="use 1 to 62")

    def zero(self) -> FixedSum:
        """Nothing folded in."""
        return FixedSum(scale=self.scale, lift_bits=self.lift_bits)

    def terms(self, message: Message, discount_C: Tensor | None) -> Iterator[Terms]:
        """Every tensor, times the weight; raises as :func:`lichen.server.sums.summed.weigh_C`."""
        weight_C = weigh_C(message, self.weighting, discount_C)
        if self.divisor == "plain" and discount_C is not None:
            yield Terms(message, weigh_C(message, self.weighting), factor_C=weight_C)
        else:
            yield Terms(message, weight_C)

    def close(self, total: FixedSum, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)``: the mean in the dtype of ``shared`` (float64 for names it lacks).

        Metrics are ``clients`` and ``weight``, the sum of the weights.

        Raises:
            LichenError: if nothing was folded in, or a shape differs from that in ``shared``.
        """
        if not total.count:
            raise LichenError(
                "no client contributed", where="aggregator.mean", fix="invite more clients or skip the round"
            )
        weight = total.weight / 2**WEIGHT_BITS
        divisor = weight if isinstance(self.divisor, str) else self.divisor
        change = fitted({name: x / divisor for name, x in fixed_point.read_sums(total).items()}, shared.trainable)
        return Shared(change), {"clients": float(total.count), "weight": weight}


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
