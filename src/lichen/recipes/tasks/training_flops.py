"""Estimates the operations of a run's training, and says what the base's own took where that is published.

A run counts its tokens and not their squares, nor which of them have a loss. So every token of a language model is
taken to have one, and every row to be of the mean length: with the weights of :mod:`lichen.models.arithmetic`, a
column of R rows and T tokens takes ``T (4 N + 6 A) + 12 L·D T² / R``, where N and A hold the output layer too. A method
without gradients is counted as if it had a backward pass. Evaluation, and rows or labels that a model writes, are not
in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lichen.core.tree import Tree
from lichen.data.sources.catalog import CATALOG
from lichen.models.arithmetic import arithmetic_of
from lichen.present.trace import Event
from lichen.recipes.assemble.column import Column
from lichen.recipes.assemble.experiment import lr_name
from lichen.recipes.assemble.workload import Workload
from lichen.recipes.schema.recipe import Recipe

__all__ = ["compute_of"]


def compute_of(
    recipe: Recipe,
    foundation: Any,
    start: Tree,
    columns: Mapping[str, Column],
    training: Mapping[str, Mapping[str, Any]],
    events: Sequence[Event],
) -> dict[str, Any] | None:
    """What a finished run's summary holds of its operations; None for a student, which has no base, and
    under privacy, where tokens are not told.

    Args:
        recipe: The run's.
        foundation: The frozen transformers model; None for a student.
        start: What is trained on it.
        columns: All columns.
        training: What the trained ones have seen, see :func:`lichen.recipes.tasks.coverage.trained`.
        events: The run's trace.
    """
    if foundation is None or recipe.noised is not None:
        return None
    arithmetic = arithmetic_of(foundation, start)
    flops = {}
    for name, seen in training.items():
        lr = columns[name].lr
        own = [event.report.tokens or 0 for event in events if event.column == name]
        chosen = sum(e.report.tokens or 0 for e in events if e.column == name and (lr is None or e.grid == lr_name(lr)))
        each = chosen / seen["rows"] if seen["rows"] else 0.0
        tokens = float(sum(own))
        rows = tokens / each if each else 0.0
        labelled = tokens if recipe.writes else rows
        flops[name] = arithmetic.train(Workload(rows=rows, tokens=tokens, labelled=labelled, square=tokens * each))
    published, source = _published(recipe)
    return {"training_flops": flops, "base_flops": published, "base_source": source}


def _published(recipe: Recipe) -> tuple[float | None, str]:
    """``(operations of the base's own training, who says so)``; None where nobody has, or the base is a part of it."""
    name, cut = recipe.model.name or "", recipe.model.layers is not None or recipe.model.random
    for entry in () if cut or not name else CATALOG.values():
        if name in (entry.name, entry.upstream) and entry.trained_flops:
            return entry.trained_flops, entry.trained_source
    return None, ""
