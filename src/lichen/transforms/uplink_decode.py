"""Decodes compressed messages before the aggregator that it wraps.

Decoding is deterministic, so the wrapped aggregator's promises hold: the same bytes in any order, on any
number of ranks. A coded row is no sum of others, though, so masks cannot lie over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from lichen.core.contracts import Aggregator
from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.transforms.codec import Chain
from lichen.transforms.layout import Layout
from lichen.transforms.uplink import WIRE

__all__ = ["Decoded"]


@final
@dataclass(frozen=True, slots=True)
class Decoded:
    """Any aggregator, for messages of :class:`lichen.transforms.uplink.Compressed`.

    Args:
        inner: What sums.
        chain: What the clients code with.
        layouts: All that clients may send: one where every client sends the same tensors in every
            round, more where rounds take turns or clients differ in rank.
    """

    inner: Aggregator
    chain: Chain
    layouts: tuple[Layout, ...]

    def zero(self) -> Any:
        """Nothing folded in."""
        return self.inner.zero()

    def add(self, total: Any, message: Message) -> Any:
        """Fold every client of the message in, decoded.

        Raises:
            LichenError: if a coded row has a layout that is none of ``layouts``, or not its length; and
                what the wrapped aggregator refuses.
        """
        return self.inner.add(total, self.decode(message))

    def decode(self, message: Message) -> Message:
        """The message as it was before it was coded, as far as the code goes."""
        tensors: Tree = {}
        for name, x in message.tensors.items():
            if not name.startswith(WIRE):
                tensors[name] = x
                continue
            found = [layout for layout in self.layouts if WIRE + layout.digest == name]
            if not found:
                raise LichenError(
                    f"tensors of layout {name.removeprefix(WIRE)} are not expected",
                    where=f"message of client {int(message.client_C[0])}",
                    fix="let clients and server run the same recipe",
                )
            tensors.update(found[0].unflatten(self.chain.decode(x, found[0])))
        return replace(message, tensors=tensors)

    def merge(self, a: Any, b: Any) -> Any:
        """Both together."""
        return self.inner.merge(a, b)

    def close(self, total: Any, shared: Tree) -> tuple[Tree, dict[str, float]]:
        """``(change, metrics)`` of the wrapped one."""
        return self.inner.close(total, shared)

    def dump(self, total: Any) -> tuple[Tree, dict[str, Any]]:
        """``(tensors, header)`` of a total."""
        return self.inner.dump(total)

    def load(self, tensors: Tree, header: Mapping[str, Any]) -> Any:
        """Undo :meth:`dump`."""
        return self.inner.load(tensors, header)
