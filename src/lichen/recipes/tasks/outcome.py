"""The result of a task, and scores that classification tasks share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch

from lichen.algorithms.scores import missing_of
from lichen.core.replies import causes_text
from lichen.data.batches.shards import Shard
from lichen.data.sources.record import Record
from lichen.recipes.assemble.column import Column
from lichen.recipes.assemble.experiment import values_N
from lichen.recipes.rows.checked_cards import Cards
from lichen.recipes.rows.prepare import first_of
from lichen.recipes.schema.recipe import Recipe
from lichen.server.fairness.gain import per_client_gain
from lichen.tasks.registry import task_of

__all__ = ["TaskResult", "baseline", "by_class", "gained", "not_scored", "over_all_rows", "tested"]

FIRST = 8
"""Clients of each cause that are named where they gave no score."""

MAX_CLASSES_LISTED = 20
"""Of more classes only the smallest and the largest count are told."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """A finished task: its columns, its clients' names, and what else there is to tell.

    ``validators`` is how many clients validated in the rounds; None where there were no rounds. ``counts`` are the
    clients' rows, by part; ``training`` is what the trained columns have seen; ``common_test`` says that all clients
    are scored on the same rows; ``cards`` are the data cards of the rows; ``attack`` says who lied on purpose;
    ``compute`` is what training took in floating-point operations; ``signed`` says that sites know one another's keys;
    ``departed`` are clients whose sites have left the federation since the run began.
    """

    columns: dict[str, Column]
    clients: tuple[str, ...]
    extra: dict[str, float | str | None] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    read: Mapping[str, Any] | None = None
    cards: Cards = field(default_factory=Cards)
    validators: int | None = None
    counts: tuple[Mapping[str, int | None], ...] = ()
    training: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    common_test: bool = False
    attack: Mapping[str, Any] | None = None
    compute: Mapping[str, Any] | None = None
    signed: bool = False
    departed: frozenset[int] = frozenset()


def _labels(shard: Shard) -> np.ndarray:
    assert isinstance(shard.labels, np.ndarray)
    return shard.labels


def baseline(recipe: Recipe, train: Sequence[Shard], test: Sequence[Shard], names: Sequence[str]) -> dict[str, Column]:
    """The column of the outputs that serve all rows best, whatever the row: such as the most frequent class.

    Args:
        recipe: Its task says what they are.
        train: Rows they are chosen by.
        test: Rows they are scored on.
        names: The outputs' names.
    """
    labels = task_of(recipe.task).labels
    assert labels is not None
    best_K = torch.from_numpy(labels.constant(np.concatenate([_labels(s) for s in train]), names))
    objective = labels.objective(names)
    scores = [objective.score(best_K.expand(s.size, -1), torch.from_numpy(_labels(s))) for s in test]
    metrics = {name: torch.stack([score[name].double() for score in scores]) for name in objective.shapes()}
    return {labels.baseline: Column(value_N=values_N(recipe, metrics), metrics=metrics)}


def over_all_rows(recipe: Recipe, columns: Mapping[str, Column]) -> dict[str, float | str | None]:
    """Every metric of the task over everybody's test rows together, for every column."""
    out: dict[str, float | str | None] = {}
    scored = {name: column for name, column in columns.items() if column.metrics}
    for name, column in scored.items():
        sums = {key: x.sum(0, keepdim=True) for key, x in column.metrics.items()}
        for metric in task_of(recipe.task).metrics:
            out[f"{name}.{metric.name}"] = float(metric.values(sums)[0])
    return out


def not_scored(columns: Mapping[str, Column], clients: int) -> dict[str, float | str | None]:
    """The columns that not all clients are in, since some have no score, or whose sums are no scores.

    Args:
        columns: By name.
        clients: How many there are.
    """
    out: dict[str, float | str | None] = {}
    for name, column in columns.items():
        if column.summed is not None and column.summed.scored < clients:
            out[f"{name}.scores"] = (
                f"of {column.summed.scored} of {clients} clients; the others have none, or were gone"
            )
        elif missing := missing_of(column.metrics):
            known = clients - int(column.value_N.isnan().sum())
            out[f"{name}.scores"] = f"of {known} of {clients} clients; missing: {causes_text(missing, FIRST)}"
        elif none := int(column.value_N.isnan().sum()):
            out[f"{name}.scores"] = f"of {clients - none} of {clients} clients; the others have none"
        elif column.summed is None and column.metrics and not len(column.value_N):
            out[f"{name}.scores"] = "left out: they do not add up, so that a client has lied"
    return out


def tested(tests: Sequence[Sequence[Record]], classes: Sequence[str]) -> dict[str, float | str | None]:
    """How many test rows each class has over all clients, without which a macro score cannot be judged.

    Args:
        tests: Each client's test rows; one that several share counts once.
        classes: In class order.
    """
    own = sorted(set(first_of(tests)))
    count = Counter(str(row.label) for at in own for row in tests[at])
    return by_class([count[name] for name in classes], classes)


def by_class(counts: Sequence[int], classes: Sequence[str]) -> dict[str, float | str | None]:
    """The same from the number of rows of each class, in class order."""
    each = ", ".join(f"{name} {n}" for name, n in zip(classes, counts, strict=True))
    if len(classes) > MAX_CLASSES_LISTED:
        each = f"{len(classes)} classes with {min(counts)} to {max(counts)}"
    return {"test rows by class": each}


def gained(with_help: Column, without: Column, *, higher_is_better: bool) -> dict[str, float | str | None]:
    """What help gave each client: on average, to the one it gave least, and the share it made worse."""
    sign = 1 if higher_is_better else -1
    found = per_client_gain(sign * with_help.value_N, sign * without.value_N)
    return {"gain.mean": found.mean, "gain.least": found.least, "gain.worse": found.worse}
