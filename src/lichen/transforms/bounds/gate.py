"""Refuses a change that is far larger than those before it: a transform with no client half.

    ‖Δ_k‖ ≤ ratio · median of the last norms that counted

A client that sends ten times what others send can lead a mean by itself. The limit of a round is made of rounds before
it, so that it is the same for all messages of the round, in whatever order they come. It is off until enough messages
have counted. While fewer than half of these are lies, liars cannot move the median past the honest ones' norms.

References:
    Ziteng Sun, Peter Kairouz, Ananda Theertha Suresh and H. Brendan McMahan. "Can You Really Backdoor Federated
    Learning?" 2019. https://arxiv.org/abs/1911.07963 (norm thresholding)

Legend: C clients, N messages that count, W norms that are remembered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.declared import Need, Property

__all__ = ["NormGate"]

NORM = "gate.norm"
"""The metric that holds a message's norm; below 0 for one of weight 0, which nothing is to be learned from."""


@final
@dataclass(frozen=True, slots=True)
class NormGate:
    """A message's norm, over all its tensors of real numbers, is so many times the running median at most.

    Args:
        ratio: So many times.
        least: Messages that must have counted before anything is refused.
        window: Norms that are remembered, the newest.

    Raises:
        LichenError: if the ratio is not above 1.
    """

    ratio: float
    least: int = 10
    window: int = 128

    def __post_init__(self) -> None:
        if not 1 < self.ratio < float("inf"):
            raise LichenError(f"{self.ratio} times the median is no limit", where="wire.gate", fix="use a number > 1")

    @property
    def name(self) -> str:
        """Of its state."""
        return "gate"

    @property
    def key(self) -> str:
        """The recipe's."""
        return "wire.gate"

    @property
    def needs(self) -> tuple[Need, ...]:
        """Nothing."""
        return ()

    @property
    def lacks(self) -> frozenset[Property]:
        """The server must look at each message."""
        return frozenset({Property.SUMS})

    @property
    def measures(self) -> tuple[str, ...]:
        """The norm."""
        return (NORM,)

    def declared(self, expected: Expected) -> Expected:
        """The same."""
        return expected

    def on_client(self, message: Message, own_C: Tree, job: Job, clients: Sequence[int]) -> tuple[Message, Tree]:
        """The message as it is."""
        return message, {}

    def on_arrival(self, message: Message, expected: Expected, state: Tree) -> Message:
        """The message with its norm.

        Raises:
            LichenError: if one is above the limit.
        """
        norm_C = self._norm_C(message)
        norms_W = state.get("norms_W", torch.empty(0, dtype=torch.float64))
        if len(norms_W) >= self.least:
            median = float(norms_W.quantile(0.5))
            for client, norm in zip(message.client_C.tolist(), norm_C.tolist(), strict=True):
                if norm > self.ratio * median:
                    raise LichenError(
                        f"its change has norm {norm:.3g}, more than {self.ratio:g} times {median:.3g}, the median of "
                        f"the last {len(norms_W)} that counted",
                        where=f"message of client {client}",
                        fix="raise wire.gate, if this client is honest",
                        reason="norm",
                    )
        return replace(message, metrics={**message.metrics, NORM: norm_C})

    def _norm_C(self, message: Message) -> Tensor:
        """One client after the other, and tensor by tensor: the same bits in any company."""
        real_C = [
            message.tensors[name] for name in sorted(message.tensors) if message.tensors[name].is_floating_point()
        ]
        rows = range(len(message.client_C))
        norms = [math.hypot(*(float(torch.linalg.vector_norm(x_C[c])) for x_C in real_C)) for c in rows]
        weight_C = message.weight_C.detach().cpu().double()
        return torch.where(weight_C == 0, -1.0, torch.tensor(norms, dtype=torch.float64))

    def on_total(
        self, change: Shared, state: Tree, arrived: Tree, *, clients: int, seed: int
    ) -> tuple[Shared, dict[str, float], Tree]:
        """The change as it is; the round's norms are remembered, and their median is a metric."""
        norm_N = arrived[NORM][arrived[NORM] >= 0]
        norms_W = torch.cat([state.get("norms_W", torch.empty(0, dtype=torch.float64)), norm_N])[-self.window :]
        measured = {"norm": float(norm_N.quantile(0.5))} if len(norm_N) else {}
        return change, measured, {"norms_W": norms_W}
