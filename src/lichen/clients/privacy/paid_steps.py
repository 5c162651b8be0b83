"""Training that a client pays for by itself, before its rows are touched: what its own budget is charged with.

A server charges for rounds; a client that trusts no server keeps an account of its own. Each training is charged before
its first row is read, and its charge is closed when the message is made, or why there is none. A training that was
broken off goes on with the charge that it has, for nothing has left; another one of a round that was closed is charged
again, and refused where the budget does not reach.

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

from lichen.core.contracts.client import ClientWork
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree

__all__ = ["PaidSteps"]


class Account(Protocol):
    """What a client's trainings are paid from; see :class:`lichen.core.secret.budget.Budget`."""

    def charge(self, round_: int) -> int:
        """Pay for a round; gives the attempt at it."""
        ...

    def close(self, round_: int, attempt: int) -> None:
        """Say that a charge is used up."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PaidState:
    """A block of clients in the middle of training, and what each was charged with.

    Attributes:
        inner: The training's.
        version: Of the job.
        attempts: By client.
    """

    inner: Any
    version: int
    attempts: Mapping[int, int]


@final
@dataclass(frozen=True, slots=True)
class PaidSteps:
    """Any work, charged for by its clients.

    Args:
        inner: What is done.
        account_of: The account of a client.
    """

    inner: ClientWork
    account_of: Callable[[int], Account]

    def expected(self, job: Job) -> Expected:
        """The work's."""
        return self.inner.expected(job)

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> PaidState:
        """The work's, once it is paid for.

        Raises:
            LichenError: if a client's account does not reach; nothing of its rows was read then.
        """
        attempts = {client: self.account_of(client).charge(job.version) for client in clients}
        state = PaidState(inner=None, version=job.version, attempts=attempts)
        with self._closing(state):
            return replace(state, inner=self.inner.init(job, clients, own_C))

    def step(self, state: PaidState, batch: Batch) -> PaidState:
        """The work's."""
        with self._closing(state):
            return replace(state, inner=self.inner.step(state.inner, batch))

    def final(self, state: PaidState) -> tuple[Message, Tree | None]:
        """The work's message, its charges closed: it may leave."""
        with self._closing(state):
            made = self.inner.final(state.inner)
        self._close(state)
        return made

    @contextmanager
    def _closing(self, state: PaidState) -> Iterator[None]:
        """Why no message is made is told, too, and so closes the charges."""
        try:
            yield
        except LichenError:
            self._close(state)
            raise

    def _close(self, state: PaidState) -> None:
        for client, attempt in state.attempts.items():
            self.account_of(client).close(state.version, attempt)
