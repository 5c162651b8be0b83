"""The messages of one round, by client: in memory up to a bound, and beyond it on the disk."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import final

from lichen.core.collecting.history import History, Retains
from lichen.core.errors import LichenError
from lichen.core.message import Job, Message, take_client

__all__ = ["RoundMessages"]


@final
class RoundMessages:
    """Retains what counted in a round, until it is cleared.

    Args:
        spill: Where messages go that memory does not hold.
        memory: Bytes of tensors that it holds at most.
        history: Retains the same, for good; None: nothing does.
    """

    def __init__(self, spill: History, *, memory: int = 1 << 29, history: Retains | None = None) -> None:
        self._spill, self._memory, self._history = spill, memory, history
        self._here: dict[int, Message] = {}
        self._there: dict[int, int] = {}  # the round, by client
        self._rounds = set[int]()
        self._used = 0

    def put(self, round_: int, message: Message, job: Job) -> None:
        """Add what clients sent; see :meth:`lichen.core.collecting.history.History.put`."""
        if self._history is not None:
            self._history.put(round_, message, job)
        self._rounds.add(round_)
        for place, client in enumerate(message.client_C.tolist()):
            one = take_client(message, place)
            nbytes = sum(x.nbytes for x in one.tensors.values())
            if self._used + nbytes > self._memory:
                self._spill.put(round_, one, job)
                self._there[client] = round_
                continue
            # A slice would hold on to the messages of all that it was cut from.
            self._here[client] = replace(one, tensors={name: x.clone() for name, x in one.tensors.items()})
            self._used += nbytes

    def retain(self, round_: int, clients: Collection[int]) -> None:
        """Only these clients' messages count."""
        if self._history is not None:
            self._history.retain(round_, clients)
        self._here = {client: one for client, one in self._here.items() if client in clients}
        self._there = {client: at for client, at in self._there.items() if client in clients}

    @property
    def clients(self) -> tuple[int, ...]:
        """Whose messages there are, ascending."""
        return tuple(sorted(self._here.keys() | self._there.keys()))

    def message(self, client: int) -> Message:
        """A client's message (C = 1).

        Raises:
            LichenError: if there is none, or its file is damaged.
        """
        if client in self._here:
            return self._here[client]
        if client not in self._there:
            raise LichenError(f"client {client} has no message in this round", where="round")
        ((message, _),) = self._spill.messages((client,), (self._there[client],))
        return message

    def clear(self) -> None:
        """Forget all of them, and delete those on the disk, those too that a kill has left of this round."""
        for round_ in self._rounds:
            self._spill.retain(round_, ())
        self._here, self._there, self._used = {}, {}, 0
