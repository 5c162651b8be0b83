"""The model that a round would have made of some of its messages alone, by the round's own aggregator and optimizer.

Two denominators. ``cohort``, the default, keeps that of the round: whoever is not in a coalition counts as having sent
its weight and no change, so that of a mean

    v(S) = −L(w + Σ_{k∈S} p_k Δ_k),    p_k the shares of the whole round.

``coalition`` leaves its message out, so that the shares of those who are in add up to 1 again, as most of the
literature has it. Then a coalition of few clients takes a step as long as everybody's, along what few clients know.

No aggregator is asked for its name: FedIT's products and FedEx-LoRA's residual come out as if the round had been so.

References:
    Tianshu Song, Yongxin Tong and Shuyue Wei. "Profit Allocation for Federated Learning." IEEE Big Data 2019.
    Tianhao Wang, Johannes Rausch, Ce Zhang, Ruoxi Jia and Dawn Song. "A Principled Approach to Data Valuation for
    Federated Learning." 2020. https://arxiv.org/abs/2009.06192 (Shapley values round by round)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, final

from torch import Tensor

from lichen.core import tree as trees
from lichen.core.collecting.round_messages import RoundMessages
from lichen.core.contracts.server import Aggregator
from lichen.core.wire.shared import Shared
from lichen.server.value.first_order import slope

__all__ = ["Coalitions", "Denominator"]

Denominator = Literal["cohort", "coalition"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Coalitions:
    """A round that can be closed again.

    Attributes:
        messages: Of the round, all that counted.
        aggregator: The round's.
        start: What clients began from, as the aggregator is given it.
        step: From a change to the server's next tensors.
        of: The denominator.
    """

    messages: RoundMessages
    aggregator: Aggregator
    start: Shared
    step: Callable[[Shared], Shared]
    of: Denominator = "cohort"

    @property
    def players(self) -> tuple[int, ...]:
        """The clients of the round."""
        return self.messages.clients

    def shared(self, coalition: frozenset[int]) -> Shared:
        """The tensors that the server would go on from.

        Raises:
            LichenError: if the aggregator cannot close these messages.
        """
        return self.step(self.change(coalition))

    def change(self, coalition: frozenset[int]) -> Shared:
        """The change that these clients' messages make; none of any tensor where nobody counts."""
        total = self.aggregator.zero()
        for client in self.players:
            message = self.messages.message(client)
            if client not in coalition:
                if self.of == "coalition":
                    continue
                message = replace(message, tensors=trees.zeros_like(message.tensors))
            total = self.aggregator.add(total, message)
        if self.aggregator.clients(total):
            return self.aggregator.close(total, self.start)[0]
        # The server's momentum, if it has any, goes on where nobody has come.
        return Shared(trees.zeros_like(self.change(frozenset(self.players)).trainable))

    def slopes(self, gradient: Mapping[str, Tensor]) -> dict[int, float]:
        """What each client's change gains to first order, ``p_k ⟨Δ_k, −∇L(w)⟩``; float64, exact sums over tensors.

        Args:
            gradient: Of the loss at what the server began from, by name.
        """
        cohort = replace(self, of="cohort")
        unmoved = cohort.shared(frozenset()).trainable
        value = {}
        for client in self.players:
            moved = cohort.shared(frozenset({client})).trainable
            names = sorted(gradient.keys() & moved.keys())
            value[client] = slope({n: moved[n].double() - unmoved[n].double() for n in names}, gradient)
        return value
