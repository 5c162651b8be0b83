"""The losses that fair averages go by: each client's mean over the rows of its local steps, as its message reports it.

Legend: C clients of a message.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message

__all__ = ["losses_of", "nobody"]


def losses_of(message: Message, weight_C: Tensor) -> list[float]:
    """Each client's mean loss, 0 where its weight is 0.

    Raises:
        LichenError: if it is not there, or not a number.
    """
    if not {"loss_sum", "count"} <= message.metrics.keys():
        raise LichenError(
            "messages tell no loss to be fair by", where="aggregator.fair", fix="use a work that trains, such as Train"
        )
    loss_C = message.metrics["loss_sum"].cpu().double() / message.metrics["count"].cpu().double().clamp(min=1)
    losses = torch.where(weight_C > 0, loss_C, 0.0).tolist()
    for client, loss in zip(message.client_C.tolist(), losses, strict=True):
        if not 0 <= loss < math.inf:
            raise LichenError(f"its loss {loss} is not a finite number >= 0", where=f"message of client {client}")
    return [float(loss) for loss in losses]


def nobody() -> LichenError:
    """The error of a round without a client."""
    return LichenError("no client contributed", where="aggregator.fair", fix="invite more clients or skip the round")
