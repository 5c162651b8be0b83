"""What goes around a client's work, a model or an aggregator.

Whatever goes around another of its kind calls it ``inner``. One can look through all of them, and put another inside.
Around an aggregator it is an :class:`AroundAggregator`, which forwards.

Legend: C clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from lichen.core.contracts.server import Aggregator, Needs
from lichen.core.message import Message, is_lifted
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["AroundAggregator", "innermost", "layers", "with_innermost"]


@runtime_checkable
class Wrapper(Protocol):
    """Goes around another work or model."""

    @property
    def inner(self) -> Any:
        """What it goes around."""
        ...


def layers(outer: object) -> Iterator[object]:
    """The wrappers, from the outside in, and last what lies inside all of them."""
    yield outer
    while isinstance(outer, Wrapper):
        outer = outer.inner
        yield outer


def innermost(outer: object) -> object:
    """What lies inside all wrappers; the thing itself where there are none."""
    *_, inner = layers(outer)
    return inner


def with_innermost(outer: Any, inner: Any) -> Any:
    """The same wrappers, which are dataclasses, around another; ``outer`` stays as it was."""
    if not isinstance(outer, Wrapper):
        return inner
    wrapper: Any = outer
    return replace(wrapper, inner=with_innermost(wrapper.inner, inner))


@dataclass(frozen=True, slots=True)
class AroundAggregator(ABC):
    """An aggregator around another: it may change a message before it is folded in, and the change at the end.

    The total is the inner one's, so whatever holds of that (any order, masks, the trip between processes)
    holds of the wrapper.

    Args:
        inner: Any.
    """

    inner: Aggregator

    @abstractmethod
    def before(self, message: Message) -> Message:
        """The raw message as the inner one takes it, with as many clients."""

    @abstractmethod
    def close(self, total: Any, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)``, made of the inner ones."""

    @property
    def needs(self) -> Needs:
        """As the inner one."""
        return self.inner.needs

    @property
    def one_version(self) -> bool:
        """As the inner one."""
        return self.inner.one_version

    def zero(self) -> Any:
        """Nothing folded in."""
        return self.inner.zero()

    def lift(self, message: Message, discount_C: Tensor | None = None) -> Message:
        """The message as the inner one lifts it; raises as that."""
        return self.inner.lift(self.before(message), discount_C)

    def add(self, total: Any, message: Message, discount_C: Tensor | None = None) -> Any:
        """Fold every client of the message in; raises as :meth:`before` and the inner one."""
        return self.inner.add(total, message if is_lifted(message) else self.before(message), discount_C)

    def clients(self, total: Any) -> int:
        """Clients folded in."""
        return self.inner.clients(total)

    def merge(self, a: Any, b: Any) -> Any:
        """Both together; raises as the inner one."""
        return self.inner.merge(a, b)

    def dump(self, total: Any) -> tuple[Tree, dict[str, Any]]:
        """``(tensors, header)`` of a total."""
        return self.inner.dump(total)

    def load(self, tensors: Tree, header: Mapping[str, Any]) -> Any:
        """Undo :meth:`dump`; raises as the inner one."""
        return self.inner.load(tensors, header)
