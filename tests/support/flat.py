"""Aggregators and server optimizers for tests that name tensors by one flat tree."""

from __future__ import annotations

from typing import Any

from lichen.core.contracts.server import Aggregator, ServerOptimizer
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["closed", "updated"]


def closed(aggregator: Aggregator, total: Any, shared: Tree) -> tuple[Tree, dict[str, float]]:
    """``(change, metrics)`` of ``close``."""
    change, metrics = aggregator.close(total, Shared.of_flat(shared))
    return change.flat(), metrics


def updated(optimizer: ServerOptimizer, change: Tree, state: Tree, shared: Tree) -> tuple[Tree, Tree]:
    """``(shared, state)`` of ``update``."""
    new, state = optimizer.update(Shared.of_flat(change), state, Shared.of_flat(shared))
    return new.flat(), state
