"""What clients' messages gain to first order: ``p_k ⟨Δ_k, −∇L(w)⟩``, the same numbers wherever they are computed.

Of a weighted mean, p_k is what a client weighs by what all together weigh. The gradient is a sum over rows, and so may
be made under masks; the product needs the client's own message, which a server has that sees single messages, and else
the client alone.

Legend: C clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from lichen.core.message import Message
from lichen.server.mean import Mean
from lichen.server.sums.summed import Weighting, weigh_C

__all__ = ["GRADIENTS", "first_order_C", "slope"]

GRADIENTS = Mean(scale=30)
"""Sums gradients, which weigh as many rows or tokens as their client has: of one, numbers up to four million."""


def slope(moves: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> float:
    """``⟨Δ, −∇L⟩`` in float64, added up exactly over tensors; of names that one of them lacks nothing.

    >>> import torch
    >>> slope({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([-3.0, 1.0])})
    1.0
    """
    names = sorted(gradient.keys() & moves.keys())
    return -math.fsum(float(moves[n].double().flatten() @ gradient[n].double().flatten()) for n in names)


def first_order_C(
    message: Message, gradient: Mapping[str, Tensor], *, weighting: Weighting, share: float
) -> list[float]:
    """Each client's value to first order.

    Args:
        message: What they sent, before it was lifted.
        gradient: Of the loss at what the round began from.
        weighting: How the round's mean weighs them.
        share: What a unit of weight moves the server: its rate by the weight of all.
    """
    weights = weigh_C(message, weighting).tolist()
    return [
        share * weight * slope({name: x_C[c] for name, x_C in message.tensors.items()}, gradient) if weight else 0.0
        for c, weight in enumerate(weights)
    ]
