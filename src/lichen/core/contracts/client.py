"""What runs at a client: a work, which is a fold over batches, and where its batches come from.

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

from lichen.core.contracts.model import Batch
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree

__all__ = ["ClientTask", "ClientWork", "Costed", "Dialogue", "Freshened", "Receives", "Source"]


class Source(Protocol):
    """Where a work's batches come from: on a real node the client's own files, in simulation all of them."""

    def shape(self, client: int) -> Hashable:
        """Clients of equal shape may share a block: the padding follows from the client's own data."""
        ...

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """Steps for these clients side by side, every client's rows drawn from ``(seed, client)`` alone."""
        ...


@runtime_checkable
class Costed(Protocol):
    """What a source may also have: how dear a client is, so that many can be dealt out evenly."""

    def cost(self, client: int) -> int:
        """Tokens of all its batches, or rows where there are no tokens; padding left out."""
        ...


class ClientWork(Protocol):
    """A fold over batches, run by every engine through :func:`lichen.core.fold.serve`.

    What its messages are is declared beforehand, so that a server can tell an honest one from damage and from lies.
    """

    def expected(self, job: Job) -> Expected:
        """What any client's message to this job must be, from the job alone: no row is looked at, nothing is copied."""
        ...

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> Any:
        """State of a block of clients. ``own_C`` is their stacked private state, None at their first time."""
        ...

    def step(self, state: Any, batch: Batch) -> Any:
        """The state after one batch; inactive clients stay bit-unchanged."""
        ...

    def final(self, state: Any) -> tuple[Message, Tree | None]:
        """The message that leaves, and the stacked private state that never does (None: keep none)."""
        ...


@runtime_checkable
class Dialogue(Protocol):
    """A client work that asks back within a job: masks need keys and shares, split learning gradients at a layer.

    A client work is one that has no questions. How they are answered is a value, too: ``lichen.engines.turns``.
    """

    def questions(self, job: Job) -> Sequence[Expected]:
        """What each question of a client must be, in their order, declared from the job alone; it asks no more."""
        ...

    def expected(self, job: Job) -> Expected:
        """What its message must be, as with any work."""
        ...

    def talk(
        self, job: Job, clients: Sequence[int], own_C: Tree | None, batches: Iterable[Batch]
    ) -> Generator[Message, Tree, tuple[Message, Tree | None]]:
        """Yield a question of all these clients, be sent their answers, ``(C, ...)``; end as ``final`` does.

        On a node the job names its own client alone; whom else it concerns comes with an answer. The talk depends on
        nothing but its arguments and the answers: where some of a block must go on alone, it is run again with the
        answers they have had. It does not yield inside a context such as ``torch.no_grad``, which would hold for
        whoever runs meanwhile.
        """
        ...


@runtime_checkable
class Freshened(Protocol):
    """What a dialogue may also be: one that has secrets, which hold for one job."""

    def fresh(self) -> Dialogue:
        """The same with new secrets. A node takes it once a job, so that talks of it that begin again have the same."""
        ...


@runtime_checkable
class Receives(Protocol):
    """A client work whose messages are not yet what an aggregator takes when they arrive."""

    def received(self, message: Message, job: Job) -> Message:
        """An admitted message as the aggregator gets it.

        Raises:
            LichenError: if it cannot be made so; the message is refused.
        """
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTask:
    """One thing a node can be asked to do: a work and the batches it folds over."""

    work: ClientWork | Dialogue
    source: Source
