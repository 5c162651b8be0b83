"""How a server answers what clients ask within a job, and whose turn it is.

Legend: C clients, N clients of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import final

import torch

from lichen.core import tree as trees
from lichen.core.collecting.admission import rows_of
from lichen.core.contracts.engine import Engine
from lichen.core.expected import ANY, Expected
from lichen.core.message import Job, Message, concatenate_messages
from lichen.core.tree import Tree

__all__ = ["Answers", "Turns", "join_questions", "stacks"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """How the server answers.

    Attributes:
        answer: ``(question, job, stage)`` to the tensors that go down, stacked as the question is, and of a client by
            nothing but the questions it is given. Stages count from 0. A :class:`LichenError` refuses the question.
        at_once: Each question when it comes; else those of a job when all who are still there have asked, sorted by
            client.
        patience: Seconds that a stage may take where not at once; who has not asked by then is missing.
    """

    answer: Callable[[Message, Job, int], Tree]
    at_once: bool = True
    patience: float = math.inf


@final
@dataclass(slots=True)
class Turns:
    """How far the clients of a job have come.

    Attributes:
        job: What they were asked.
        questions: What each of theirs must be.
        count: Questions that were answered, by client.
        open: Who waits for an answer.
        done: Who has sent its message, or said that it cannot.
        dismissed: Who is not listened to any more.
        pending: Questions to be answered when all have asked.
        stage: How many times all were answered.
    """

    job: Job
    questions: tuple[Expected, ...]
    count: dict[int, int] = field(default_factory=dict)
    open: set[int] = field(default_factory=set)
    done: set[int] = field(default_factory=set)
    dismissed: set[int] = field(default_factory=set)
    pending: list[Message] = field(default_factory=list)
    stage: int = 0

    def answered(self, clients: Sequence[int]) -> None:
        """These have their answer."""
        self.open.difference_update(clients)
        self.count.update({client: self.count.get(client, 0) + 1 for client in clients})

    def dismiss(self, clients: Sequence[int]) -> None:
        """Listen to these no more; what they have asked is not answered."""
        self.dismissed.update(clients)
        self.open.difference_update(clients)
        left = (
            (message, [c for c, client in enumerate(message.client_C.tolist()) if client not in self.dismissed])
            for message in self.pending
        )
        self.pending = [rows_of(message, rest) for message, rest in left if rest]

    def absent(self) -> list[int]:
        """Of whom nothing has come in this stage."""
        known = self.open | self.done | self.dismissed
        return [client for client in self.job.clients if client not in known]


def stacks(question: Expected) -> bool:
    """Whether the questions of any clients stack."""
    shapes = (spec.shape for spec in question.tensors.values())
    return not (question.texts or question.optional or any(ANY in shape for shape in shapes))


def join_questions(engine: Engine, mine: Sequence[Message], turns: Turns) -> Message | None:
    """The questions of all ranks, sorted by client."""
    client_N, tree = torch.empty(0, dtype=torch.int64), Tree()
    if mine:
        one = concatenate_messages(mine)
        client_N, tree = one.client_C, trees.join("m.", one.metrics, trees.join("t.", one.tensors, {}))
        tree["weight"] = one.weight_C
    client_N, tree, _ = engine.join(client_N, tree)
    if not len(client_N):
        return None
    return Message(
        group=turns.questions[turns.stage].group,
        client_C=client_N,
        version_C=torch.full_like(client_N, turns.job.version),
        tensors=trees.split(tree, "t.")[0],
        weight_C=tree["weight"],
        metrics=trees.split(tree, "m.")[0],
    )
