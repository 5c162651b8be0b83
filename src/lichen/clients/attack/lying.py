"""A work whose liars change what they send, so that a defence at the server can be tested.

The lie is told before any transform sees the message, so that clipping, codecs and admission do to it what they do to
an honest one. A liar trains as ever; only what leaves it is changed, and its private state stays what it was. Honest
clients of the same block are not touched by a bit.

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

import torch

from lichen.core.contracts.client import ClientWork
from lichen.core.contracts.model import Batch
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree

__all__ = ["Lying", "MessageAttack"]


class MessageAttack(Protocol):
    """What a liar sends in place of what it has learned."""

    def lie(self, delta: Tree, weight: float, *, client: int, seed: int, most: float) -> tuple[Tree, float]:
        """``(tensors, weight)`` of a liar's message.

        Args:
            delta: Its tensors, without client axis.
            weight: What it weighs, above 0.
            client: Who it is.
            seed: Of the round.
            most: What the work declares that a client weighs at most.
        """
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LyingState:
    """The wrapped work's state, and what was asked."""

    inner: Any
    job: Job


@final
@dataclass(frozen=True, slots=True)
class Lying:
    """Any work, some of whose clients lie. Who weighs nothing says nothing, and is left as it is.

    Args:
        inner: What is done.
        attack: What becomes of a liar's message.
        liars: Who lies.
    """

    inner: ClientWork
    attack: MessageAttack
    liars: frozenset[int]

    def expected(self, job: Job) -> Expected:
        """The work's: a lie is told within what an honest client might send."""
        return self.inner.expected(job)

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> LyingState:
        """The work's."""
        return LyingState(inner=self.inner.init(job, clients, own_C), job=job)

    def step(self, state: LyingState, batch: Batch) -> LyingState:
        """The work's."""
        return replace(state, inner=self.inner.step(state.inner, batch))

    def final(self, state: LyingState) -> tuple[Message, Tree | None]:
        """The work's message with lies in the liars' places, and its private state."""
        message, own_C = self.inner.final(state.inner)
        weights = message.weight_C.tolist()
        lying = [(c, k) for c, k in enumerate(message.client_C.tolist()) if k in self.liars and weights[c] > 0]
        if not lying:
            return message, own_C
        most = self.inner.expected(state.job).weight[1]
        tensors = {name: x_C.clone() for name, x_C in message.tensors.items()}
        for c, client in lying:
            delta = {name: x_C[c] for name, x_C in message.tensors.items() if x_C.is_floating_point()}
            lie, weights[c] = self.attack.lie(delta, weights[c], client=client, seed=state.job.seed, most=most)
            for name, x in lie.items():
                tensors[name][c] = x
        weight_C = torch.tensor(weights, dtype=message.weight_C.dtype, device=message.weight_C.device)
        return replace(message, tensors=tensors, weight_C=weight_C), own_C
