"""Rounds to which nobody may have anything to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from lichen.core import tree as trees
from lichen.core.message import Message
from lichen.core.wire.shared import Shared
from lichen.core.wrapping import AroundAggregator

__all__ = ["AllowEmpty"]


@final
@dataclass(frozen=True, slots=True)
class AllowEmpty(AroundAggregator):
    """For rounds in which it may be that nobody has anything to say: the change is then zero."""

    def before(self, message: Message) -> Message:
        """The message itself."""
        return message

    def close(self, total: Any, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """The aggregator's change, or zeros with the metrics ``clients`` and ``weight`` at 0."""
        if self.inner.clients(total):
            return self.inner.close(total, shared)
        return Shared(trees.zeros_like(shared.trainable)), {"clients": 0.0, "weight": 0.0}
