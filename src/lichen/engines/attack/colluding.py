"""An engine whose liars know each other, and all that the honest clients of their round send.

The replies to a job of training are held back until all of its clients have answered. The liars' changes are then made
of the honest ones (:mod:`lichen.clients.attack.collusion`), and all replies are handed on in the order in which they
came. So all messages of a round are in memory at once, and their spread beside them, where a sum alone would be.

Liars see changes as they leave the clients, clipped where a recipe clips; what they send is not clipped at a client any
more, only on its arrival. They weigh, and tell of themselves, what they would have done.

Legend: C clients of a reply, H honest clients.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import final

import torch

from lichen.clients.attack.collusion import Collusion
from lichen.core import tree as trees
from lichen.core.contracts.engine import Engine
from lichen.core.message import Job, Message, concatenate_messages, take_client
from lichen.core.replies import Reply
from lichen.core.tree import Tree
from lichen.engines.around import ForwardingEngine

__all__ = ["ColludingEngine"]


@final
class ColludingEngine(ForwardingEngine):
    """An engine around another, whose clients all answer; who weighs nothing is neither listened to nor changed.

    Args:
        inner: Does the work, and counts bytes; a lie has as many as the truth.
        collusion: What liars make of the honest changes.
        liars: Who lies.
        attacked: In which jobs.
    """

    def __init__(
        self,
        inner: Engine,
        collusion: Collusion,
        liars: Collection[int],
        *,
        attacked: Callable[[Job], bool] = lambda job: True,
    ) -> None:
        self.inner, self.collusion, self.liars, self.attacked = inner, collusion, frozenset(liars), attacked
        self._waiting: dict[int, set[int]] = {}  # who has not answered an attacked job
        self._came: dict[int, list[Reply]] = {}  # what is held back of it
        self._ready: dict[int, deque[Reply]] = {}  # what may be handed on

    def submit(self, job: Job) -> int:
        """Send a job out."""
        number = self.inner.submit(job)
        if self.attacked(job):
            self._waiting[number], self._came[number] = set(job.clients), []
        return number

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """The inner engine's; those to an attacked job once all have come."""
        yield from self._handed_on(numbers)
        for reply in self.inner.replies(numbers, until):
            if reply.job not in self._came:
                yield reply
                continue
            self._came[reply.job].append(reply)
            self._waiting[reply.job] -= set(reply.clients)
            if not self._waiting[reply.job]:
                self._ready[reply.job] = deque(_lied(self._came.pop(reply.job), self.collusion, self.liars))
                yield from self._handed_on((reply.job,))

    def _handed_on(self, numbers: Collection[int]) -> Iterator[Reply]:
        for number in numbers:
            while self._ready.get(number):
                yield self._ready[number].popleft()

    def cancel(self, number: int) -> None:
        """Give a job up, and what was held back of it."""
        for jobs in (self._waiting, self._came, self._ready):
            jobs.pop(number, None)
        self.inner.cancel(number)


def _lied(replies: Sequence[Reply], collusion: Collusion, liars: frozenset[int]) -> list[Reply]:
    """All replies to a job, with the liars' changes in the place of their own; as they are where nobody is honest."""
    each = [(client, weight, c, at) for at, reply in enumerate(replies) for client, weight, c in _rows(reply.message)]
    honest = sorted(row for row in each if row[0] not in liars and row[1] > 0)
    lying = [row for row in each if row[0] in liars and row[1] > 0]
    if not honest or not lying:
        return list(replies)
    # In the clients' order, so that a lie has the same bits in whatever blocks they came.
    messages = [take_client(_message(replies[at]), c) for _, _, c, at in honest]
    stacked = concatenate_messages(messages)
    honest_H: Tree = {name: x_H for name, x_H in stacked.tensors.items() if x_H.is_floating_point()}
    lie = collusion.crafted(honest_H, len(lying)) if honest_H else {}
    out = list(replies)
    for at in {row[3] for row in lying}:
        message = _message(out[at])
        tensors = trees.map_tree(torch.clone, message.tensors)
        for _, _, c, where in lying:
            if where == at:
                for name, x in lie.items():
                    tensors[name][c] = x
        out[at] = replace(out[at], message=replace(message, tensors=tensors))
    return out


def _rows(message: Message | None) -> list[tuple[int, float, int]]:
    if message is None:
        return []
    pairs = zip(message.client_C.tolist(), message.weight_C.tolist(), strict=True)
    return [(client, weight, c) for c, (client, weight) in enumerate(pairs)]


def _message(reply: Reply) -> Message:
    assert reply.message is not None
    return reply.message
