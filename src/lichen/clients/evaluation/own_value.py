"""A client's value that the client computes for itself and keeps: the server sees single messages no more than before.

Two works. :class:`Remembering` goes around a training and keeps what the client sends in its private state.
:class:`OwnValue` is asked after the round of those whose messages are in its sum: the job brings the gradient of the
loss and what a unit of weight moved the server, the client multiplies, notes its value in a file of its own, and sends
nothing back. Of its message no more
leaves than without values: a sum of values over some of the clients would, beside the sum over all, tell what the rest
have. What leaves of its validation rows is their gradient, in a sum (:mod:`lichen.clients.evaluation.gradient`).

Legend: C clients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Protocol, final

import torch

from lichen.core import tree as trees
from lichen.core.contracts.client import ClientWork
from lichen.core.contracts.model import Batch
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.server.sums.summed import Weighting
from lichen.server.value.first_order import first_order_C

__all__ = ["SHARE", "Notes", "OwnValue", "Remembering"]

SHARE = "share"
"""A job's setting: what a unit of weight moved the server."""

_SENT = "sent/"
_WEIGHT, _VERSION = "weight", "version"
_TENSORS = "tensors/"


class Notes(Protocol):
    """Where a client's values are kept."""

    def note(self, client: int, round_: int, value: float) -> None:
        """Keep a value; one of the same round is replaced."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RememberingState:
    """A block of clients in the middle of a round: the training, and the job's version."""

    inner: Any
    version: int


@final
@dataclass(frozen=True, slots=True)
class Remembering:
    """A training whose clients keep what they have sent last.

    Args:
        inner: The training, its message as it is lifted.
        every: Rounds from one that is valued to the next; in all others nothing is kept.
    """

    inner: ClientWork
    _: KW_ONLY
    every: int = 1

    def expected(self, job: Job) -> Expected:
        """The training's."""
        return self.inner.expected(job)

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> RememberingState:
        """The training's, without what was sent before."""
        rest = trees.split(own_C or {}, _SENT)[1]
        return RememberingState(inner=self.inner.init(job, clients, rest or None), version=job.version)

    def step(self, state: RememberingState, batch: Batch) -> RememberingState:
        """The training's."""
        return replace(state, inner=self.inner.step(state.inner, batch))

    def final(self, state: RememberingState) -> tuple[Message, Tree | None]:
        """The training's message, and what is kept with it beside."""
        message, own_C = self.inner.final(state.inner)
        if (state.version + 1) % self.every:
            return message, own_C
        tensors = {name: x_C.detach() for name, x_C in message.tensors.items()}
        sent = {
            **trees.join(_TENSORS, tensors, {}),
            _WEIGHT: message.weight_C.detach().double(),
            _VERSION: message.version_C.detach(),
        }
        return message, trees.join(_SENT, sent, own_C or {})


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class OwnValueState:
    """A block of clients that are about to value what they sent."""

    job: Job
    clients: tuple[int, ...]
    sent: Tree


@final
@dataclass(frozen=True, slots=True)
class OwnValue:
    """Each client's value of the round that has just been closed, noted at home; the message is empty.

    A client that kept nothing of that round, as its folder was lost, notes nothing.

    Args:
        group: Of the messages.
        notes: Where values are kept; None: nowhere, as where time is measured.
        weighting: How the round's mean weighs clients.
    """

    group: str
    notes: Notes | None = None
    _: KW_ONLY
    weighting: Weighting = "examples"

    def expected(self, job: Job) -> Expected:
        """Nothing."""
        return Expected(group=self.group, weight=(0.0, 0.0))

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> OwnValueState:
        """What the clients have kept."""
        return OwnValueState(job=job, clients=tuple(clients), sent=trees.split(own_C or {}, _SENT)[0])

    def step(self, state: OwnValueState, batch: Batch) -> OwnValueState:
        """No batch comes."""
        return state

    def final(self, state: OwnValueState) -> tuple[Message, Tree | None]:
        """An empty message, once the values are noted; the private state stays."""
        client_C = torch.tensor(state.clients, dtype=torch.int64)
        nothing = Message(
            group=self.group,
            client_C=client_C,
            version_C=torch.full_like(client_C, state.job.version),
            tensors={},
            weight_C=torch.zeros(len(client_C), dtype=torch.float64),
        )
        if self.notes is None or not state.sent:
            return nothing, None
        before = replace(
            nothing,
            tensors=trees.split(state.sent, _TENSORS)[0],
            weight_C=state.sent[_WEIGHT].cpu(),
            version_C=state.sent[_VERSION].cpu(),
        )
        share, gradient = float(state.job.settings[SHARE]), state.job.shared.trainable
        values = first_order_C(before, gradient, weighting=self.weighting, share=share)
        for client, version, value in zip(state.clients, before.version_C.tolist(), values, strict=True):
            if version + 1 == state.job.version and math.isfinite(value):  # of an older round it says nothing
                self.notes.note(client, state.job.version, value)
        return nothing, None
