"""Decodes compressed messages before the aggregator that it wraps.

Decoding is deterministic, so the wrapped aggregator's promises hold: the same bytes in any order, on any
number of ranks. A coded row is no sum of others, though, so masks cannot lie over it: a client that lifts
decodes first, and sends 64-bit integers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.core.wrapping import AroundAggregator
from lichen.transforms.codec import Chain
from lichen.transforms.layout import Layout
from lichen.transforms.uplink import WIRE

__all__ = ["Decoded"]


@final
@dataclass(frozen=True, slots=True)
class Decoded(AroundAggregator):
    """Any aggregator, for messages of :class:`lichen.transforms.uplink.Compressed`.

    Args:
        inner: What sums.
        chain: What the clients code with.
        layouts: All that clients may send: one where every client sends the same tensors in every
            round, more where rounds take turns or clients differ in rank.
    """

    chain: Chain
    layouts: tuple[Layout, ...]

    def before(self, message: Message) -> Message:
        """The message as it was before it was coded, as far as the code goes.

        Raises:
            LichenError: if a coded row has a layout that is none of ``layouts``, or not its length.
        """
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

    def close(self, total: Any, shared: Tree) -> tuple[Tree, dict[str, float]]:
        """``(change, metrics)`` of the wrapped one."""
        return self.inner.close(total, shared)
