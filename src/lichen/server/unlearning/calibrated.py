"""Calibration of FedEraser: a client's new change gives the direction, the one it sent in the run gives the length.

    Ũ = ‖U_stored‖ · U / ‖U‖, tensor by tensor

U is what the client sends now, from a model that has forgotten somebody. A tensor that does not move now has no
direction, and stays. The client weighs what it weighed in the run, however few steps it took for the calibration.

References:
    Gaoyang Liu, Xiaoqiang Ma, Yang Yang, Chen Wang and Jiangchuan Liu. "FedEraser: Enabling Efficient Client-Level
    Data Removal from Federated Learning Models." IWQoS 2021. https://doi.org/10.1109/IWQOS52092.2021.9521274

Legend: C clients.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.collecting.history import History
from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.core.wrapping import AroundAggregator

__all__ = ["Calibrated"]


@final
@dataclass(frozen=True, slots=True)
class Calibrated(AroundAggregator):
    """Another aggregator, to which each message comes as long as the one that its client sent in a round of the run.

    Args:
        inner: Any.
        history: What the clients sent in the run.
        round: The round, from 0.
    """

    _: KW_ONLY
    history: History
    round: int

    def before(self, message: Message) -> Message:
        """The messages calibrated; one of weight 0, whose client failed, still weighs nothing.

        Raises:
            LichenError: if a client sent other tensors in that round, or a file is damaged.
        """
        stored = [self._stored(client) for client in message.client_C.tolist()]
        each = [
            _calibrated({name: x_C[place] for name, x_C in message.tensors.items()}, one)
            for place, one in enumerate(stored)
        ]
        weight_C = torch.stack([one.weight_C[0] for one in stored]).to(message.weight_C)
        return replace(
            message,
            tensors={name: torch.stack([one[name] for one in each]) for name in message.tensors},
            weight_C=torch.where(message.weight_C > 0, weight_C, message.weight_C),
        )

    def close(self, total: Any, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """As the inner one."""
        return self.inner.close(total, shared)

    def _stored(self, client: int) -> Message:
        for message, _ in self.history.messages((client,), (self.round,)):
            return message
        raise LichenError(f"has no message of client {client} in round {self.round}", where=str(self.history.folder))


def _calibrated(new: Tree, stored: Message) -> Tree:
    if new.keys() != stored.tensors.keys():
        odd = min(new.keys() ^ stored.tensors.keys())
        raise LichenError(f"tensor {odd!r} is of one of the two changes alone", where="history")
    return {name: _as_long(x, stored.tensors[name][0]) for name, x in new.items()}


def _as_long(new: Tensor, stored: Tensor) -> Tensor:
    """The new tensor times the quotient of both norms: of two equal ones it is exactly 1."""
    new_norm, stored_norm = (float(torch.linalg.vector_norm(x.to(torch.float64, copy=True))) for x in (new, stored))
    return (new.double() * (stored_norm / new_norm)).to(new.dtype) if new_norm > 0 else new
