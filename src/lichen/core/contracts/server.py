"""What the server does with messages and tensors: a fold over messages, a step, who is invited and gets what.

Legend: C clients, N clients of the roster.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Literal, Protocol

from torch import Tensor

from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["Aggregator", "Needs", "Sampler", "ServerOptimizer", "Submodel"]

Needs = Literal["sum", "single"]
"""What an aggregator needs of messages: their sum, or to see each."""


class Aggregator(Protocol):
    """A monoid over messages: ``zero``, ``add``, ``merge``, ``close``; the same bytes in any order.

    :mod:`lichen.fl.testing` holds its laws.
    """

    @property
    def needs(self) -> Needs:
        """``"sum"``: :meth:`close` is a function of one sum of integers, which can be taken under masks;
        ``"single"``: the server must look at single messages.
        """
        ...

    @property
    def one_version(self) -> bool:
        """:meth:`close` holds only for messages that were made for the tensors it is given: none may be old."""
        ...

    def zero(self) -> Any: ...
    def lift(self, message: Message, discount_C: Tensor | None = None) -> Message:
        """The client's half of :meth:`add`: the message weighed and rounded to int64, so that it only has to be added.

        It runs at the client where masks lie over its result, and nowhere else by need: ``add`` of a raw
        message gives the bytes of ``add`` of the lifted one. Its form: :mod:`lichen.server.sums.lifted`.

        Raises:
            LichenError: if a number is past what a lifted one may be, or the aggregator needs single messages.
        """
        ...

    def add(self, total: Any, message: Message, discount_C: Tensor | None = None) -> Any:
        """Fold every client of ``message`` in, raw or lifted.

        Args:
            total: What was folded in so far; it stays as it is.
            message: From any clients.
            discount_C: ``(C,)`` from 0 to 1, by age of the messages: multiplies each client's weight, whatever
                that is made of. None: 1. A lifted message was discounted when it was lifted.
        """
        ...

    def clients(self, total: Any) -> int:
        """Clients folded in, those of weight 0 left out; 0 means that there is nothing to close."""
        ...

    def merge(self, a: Any, b: Any) -> Any: ...
    def close(self, total: Any, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)``: how far trainable tensors move; patches and frozen tensors replace those of their
        names as they are.

        Raises:
            LichenError: if nothing was folded in.
        """
        ...

    def dump(self, total: Any) -> tuple[Tree, dict[str, Any]]:
        """``(tensors, header)`` that stand for a total, so that it can cross between processes.

        The header is what JSON can write, integers of any size among it.
        """
        ...

    def load(self, tensors: Tree, header: Mapping[str, Any]) -> Any:
        """Undo :meth:`dump`: the total merges and closes to the same bytes.

        Raises:
            LichenError: if these are not a total of this aggregator.
        """
        ...


class ServerOptimizer(Protocol):
    """Turns the round's mean change into the next shared tensors."""

    def init(self, shared: Shared) -> Tree: ...
    def update(self, change: Shared, state: Tree, shared: Shared) -> tuple[Shared, Tree]:
        """``(shared, state)`` after one step; only names of the change are touched."""
        ...


class Submodel(Protocol):
    """What weaker clients get of the shared tensors: fewer layers, or a lower rank."""

    def key(self, client: int) -> Hashable:
        """Clients of equal key get equal tensors."""
        ...

    def extract(self, shared: Shared, key: Hashable) -> Shared:
        """The tensors of a job for clients of this key."""
        ...


class Sampler(Protocol):
    """Who is invited."""

    def invite(self, weight_N: Tensor, seed: int) -> tuple[int, ...]:
        """Roster indices, ascending, drawn from ``seed``; ``weight_N`` are the clients' example counts."""
        ...
