"""What happens to a message on its way from a client's work to the aggregator: clip, code, noise, mask.

A transform has a client half, which runs after the work, an arrival half, which runs at the server once a message is
admitted, and a total half, which runs there once a round's messages have become one change. Several stand in a row:
left to right at the client, right to left at the server. Each may keep private state at its clients, and a state of its
own at the server.

Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, and McMahan et al., "Learning Differentially Private
Recurrent Language Models", ICLR 2018, have clip and noise of this shape; codecs have it too.

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, final

from lichen.core import tree as trees
from lichen.core.contracts.client import ClientWork
from lichen.core.contracts.model import Batch
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.declared import Need, Property

__all__ = ["Transform", "Transformed", "measures", "on_total"]


class Transform(Protocol):
    """A client half, an arrival half and a total half."""

    @property
    def name(self) -> str:
        """Prefix of its private state; no two of a row have the same."""
        ...

    @property
    def key(self) -> str:
        """The recipe's key that asks for it: what an error names."""
        ...

    @property
    def needs(self) -> tuple[Need, ...]:
        """What all other parts of an algorithm must allow; masks need ``Property.SUMS``."""
        ...

    @property
    def lacks(self) -> frozenset[Property]:
        """What is no longer possible with it: ``SUMS`` where the server must look at each message on arrival,
        ``LOST_ANSWERS`` where its clients remember a message elsewhere than in their private state, which goes back
        where a message did not count.
        """
        ...

    def declared(self, expected: Expected) -> Expected:
        """What messages are after the client half, from what they were before."""
        ...

    def on_client(self, message: Message, own_C: Tree, job: Job, clients: Sequence[int]) -> tuple[Message, Tree]:
        """``(message, private state)`` of these clients. ``own_C`` is empty at their first time."""
        ...

    @property
    def measures(self) -> tuple[str, ...]:
        """Metrics that the arrival half adds to a message, for the total half."""
        ...

    def on_arrival(self, message: Message, expected: Expected, state: Tree) -> Message:
        """The message as the aggregator gets it.

        Args:
            message: As the client half left it.
            expected: What it was declared to be before the client half.
            state: What the total half has left, the same for all messages of a round; it stays as it is.

        Raises:
            LichenError: if it cannot be so; the message is refused, by the error's reason.
        """
        ...

    def on_total(
        self, change: Shared, state: Tree, arrived: Tree, *, clients: int, seed: int
    ) -> tuple[Shared, dict[str, float], Tree]:
        """``(change, metrics, state)``: a round's change as the server optimizer gets it.

        Args:
            change: As the aggregator has closed it.
            state: What the last round's gave; empty before the first. A round without a step leaves it as it is.
            arrived: Of :attr:`measures`, those of the messages that count, ``(N, ...)`` by client.
            clients: How many the change is made of.
            seed: Of this transform in this round.
        """
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TransformedState:
    """The wrapped work's state, what was asked of whom, and the transforms' private state by their names."""

    inner: Any
    job: Job
    clients: tuple[int, ...]
    own_C: dict[str, Tree]


@final
@dataclass(frozen=True, slots=True)
class Transformed:
    """Any work, its messages changed by transforms; the server knows by the same object how they arrive.

    Args:
        inner: What is done.
        transforms: Left to right.
        state: What their total halves have left at the server, by their names; clients have none.
    """

    inner: ClientWork
    transforms: tuple[Transform, ...]
    state: Tree = field(default_factory=dict)

    def expected(self, job: Job) -> Expected:
        """The wrapped work's, as the transforms leave it."""
        return self._declared(job)[-1]

    def _declared(self, job: Job) -> list[Expected]:
        """What messages are before the first transform, and after each."""
        out = [self.inner.expected(job)]
        for transform in self.transforms:
            out.append(transform.declared(out[-1]))
        return out

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> TransformedState:
        """The wrapped work's beginning; it does not see the transforms' private state."""
        rest, mine = dict(own_C or {}), dict[str, Tree]()
        for transform in self.transforms:
            mine[transform.name], rest = trees.split(rest, f"{transform.name}/")
        inner = self.inner.init(job, clients, rest or None)
        return TransformedState(inner=inner, job=job, clients=tuple(clients), own_C=mine)

    def step(self, state: TransformedState, batch: Batch) -> TransformedState:
        """The wrapped work's step."""
        return replace(state, inner=self.inner.step(state.inner, batch))

    def final(self, state: TransformedState) -> tuple[Message, Tree | None]:
        """The wrapped work's message, changed; and its private state, with that of the transforms."""
        message, own_C = self.inner.final(state.inner)
        for transform in self.transforms:
            message, retained_C = transform.on_client(message, state.own_C[transform.name], state.job, state.clients)
            own_C = trees.join(f"{transform.name}/", retained_C, own_C or {}) if retained_C else own_C
        return message, own_C

    def received(self, message: Message, job: Job) -> Message:
        """An admitted message as the aggregator gets it.

        Raises:
            LichenError: if a transform cannot undo it.
        """
        before = self._declared(job)[:-1]
        for transform, expected in zip(reversed(self.transforms), reversed(before), strict=True):
            mine, _ = trees.split(self.state, f"{transform.name}/")
            message = transform.on_arrival(message, expected, mine)
        return message


def measures(transforms: Sequence[Transform]) -> tuple[str, ...]:
    """Metrics that the arrival halves of a row add."""
    return tuple(name for transform in transforms for name in transform.measures)


def on_total(
    transforms: Sequence[Transform], change: Shared, state: Tree, arrived: Tree, *, clients: int, seed: int
) -> tuple[Shared, dict[str, float], Tree]:
    """``(change, metrics, state)`` after the total halves of a row; ``state`` is that of all, by their names."""
    metrics, after = dict[str, float](), Tree()
    for transform in reversed(transforms):
        mine, _ = trees.split(state, f"{transform.name}/")
        measured = {name: arrived[name] for name in transform.measures}
        own_seed = derive(seed, transform.name)
        change, own_metrics, mine = transform.on_total(change, mine, measured, clients=clients, seed=own_seed)
        metrics.update(own_metrics)
        after = trees.join(f"{transform.name}/", mine, after)
    return change, metrics, after
