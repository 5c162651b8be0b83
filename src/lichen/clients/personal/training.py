"""Trains tensors of a client's own beside the shared ones, on the same batches; nothing of them leaves.

A method of personal models is a few functions (:class:`PersonalMethod`) around any training: the message is the
training's own, and what the client keeps lies in its private state under ``mine/``. Where the server keeps the best
round, the client's tensors of that round stay with it, as with all private state
(:meth:`lichen.core.store.ClientStore.stage`).

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

from torch import Tensor

from lichen.clients.training.gradient_steps import Proximal
from lichen.clients.training.train import Train
from lichen.core import tree as trees
from lichen.core.contracts.client import ClientWork
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.core.wrapping import innermost

__all__ = ["MINE", "OwnModels", "Personal", "PersonalMethod", "PersonalTraining", "own_training"]

MINE = "mine/"
"""Before the names of a method's tensors in the private state."""


def own_training(train: Train, *, mu: float = 0.0) -> Train:
    """A client's training of tensors that are its own, with the steps of the shared one.

    Args:
        train: The shared one.
        mu: A pull towards the shared tensors, in the place of the shared training's.
    """
    steps = tuple(step for step in train.gradient_steps if not isinstance(step, Proximal))
    pull = (Proximal(mu),) if mu else ()
    return replace(train, personal=True, freeze_schedule=(), local_params=(), gradient_steps=(*steps, *pull))


class OwnModels(Protocol):
    """What makes models of what clients keep."""

    def model(self, shared: Tree, mine_C: Tree) -> Tree:
        """The clients' own tensors that make their models, beside which the shared ones stay; ``(C, ...)``."""
        ...


class PersonalMethod(OwnModels, Protocol):
    """What a client trains for itself beside the shared model, and how it becomes a model."""

    def init(self, train: Train, job: Job, clients: Sequence[int], mine_C: Tree, shared: Any) -> tuple[Any, Any]:
        """``(own state, state of the shared training)`` at the beginning of a round.

        Args:
            train: The shared training.
            job: What is asked.
            clients: Who is asked.
            mine_C: What they have kept; empty at their first time.
            shared: The state of the shared training at its beginning.
        """
        ...

    def step(self, train: Train, own: Any, shared: Any, batch: Batch) -> tuple[Any, Any]:
        """Both states before the shared training takes its step with this batch, the own one after its own step."""
        ...

    def final(self, own: Any, shared: Any, finite_C: Tensor) -> Tree:
        """What the clients keep; those whose training did not stay finite, what they had."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PersonalState:
    """The shared training in the middle of a round, and the own one."""

    shared: Any
    own: Any


@final
@dataclass(frozen=True, slots=True)
class PersonalTraining:
    """A training, and a method of personal models beside it, as one client work.

    Args:
        inner: The shared training, a :class:`lichen.clients.training.train.Train` or around one.
        method: What is trained beside it.
    """

    inner: ClientWork
    method: PersonalMethod

    @property
    def _train(self) -> Train:
        train = innermost(self.inner)
        if not isinstance(train, Train):
            raise LichenError("no training by gradients lies inside", where="personal.kind", fix="use adamw or sgd")
        return train

    def expected(self, job: Job) -> Expected:
        """The shared training's: nothing else leaves."""
        return self.inner.expected(job)

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> PersonalState:
        """Both trainings at their beginning; raises as the shared one."""
        mine_C, rest = trees.split(own_C or {}, MINE)
        shared = self.inner.init(job, clients, rest or None)
        own, shared = self.method.init(self._train, job, clients, mine_C, shared)
        return PersonalState(shared=shared, own=own)

    def step(self, state: PersonalState, batch: Batch) -> PersonalState:
        """One step of both."""
        own, shared = self.method.step(self._train, state.own, state.shared, batch)
        return PersonalState(shared=self.inner.step(shared, batch), own=own)

    def final(self, state: PersonalState) -> tuple[Message, Tree | None]:
        """The shared training's message, and all that is kept."""
        message, retained_C = self.inner.final(state.shared)
        mine_C = self.method.final(state.own, state.shared, message.metrics["failed"] == 0)
        return message, trees.join(MINE, mine_C, retained_C or {})


@final
@dataclass(frozen=True, slots=True)
class Personal:
    """A work on the clients' own models, such as an evaluation; who has none yet has the shared one.

    Args:
        inner: Reads ``params/`` of the private state, and writes none.
        method: Makes them.
    """

    inner: ClientWork
    method: OwnModels

    def expected(self, job: Job) -> Expected:
        """The work's."""
        return self.inner.expected(job)

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> Any:
        """The work's beginning, with the clients' models in the place of ``params/``; raises as that."""
        mine_C, rest = trees.split(own_C or {}, MINE)
        if mine_C:
            models_C = trees.join("params/", self.method.model(job.shared.trainable, mine_C), rest)
            rest = trees.join(MINE, mine_C, models_C)
        return self.inner.init(job, clients, rest or None)

    def step(self, state: Any, batch: Batch) -> Any:
        """The work's."""
        return self.inner.step(state, batch)

    def final(self, state: Any) -> tuple[Message, Tree | None]:
        """The work's message; what the clients keep stays as it is."""
        return self.inner.final(state)[0], None
