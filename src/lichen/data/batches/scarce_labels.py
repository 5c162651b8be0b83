"""Batches with a fixed number of labelled and unlabelled rows a client, for semi-supervised learning.

Drawn from one permutation, a batch of a client with five labels in a hundred rows would mostly hold none.
Here both kinds have their own permutations, as the labelled and the unlabelled loader of FixMatch (Sohn et
al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", NeurIPS 2020,
https://arxiv.org/abs/2001.07685).

Legend: C clients, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import numpy as np

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator
from lichen.data.batches.collate import Slot, assemble, stream
from lichen.data.batches.rows import Shard
from lichen.data.batches.shards import TrainSource

__all__ = ["ScarceLabels", "hide"]

_PURPOSES = ("shuffle", "unlabelled")


@final
@dataclass(frozen=True, slots=True, eq=False)
class ScarceLabels:
    """A training source that draws a client's labelled and unlabelled rows apart.

    Attributes:
        local: The clients' rows, unlabelled ones with label -100; ``batch_size`` labelled ones a batch.
        unlabelled_rows: Unlabelled rows of a batch, below the labelled ones.
        replacement: Unlabelled rows are drawn with replacement, each batch from all of them.

    Raises:
        LichenError: if there are no unlabelled rows in a batch.
    """

    local: TrainSource
    _: KW_ONLY
    unlabelled_rows: int
    replacement: bool = False

    def __post_init__(self) -> None:
        if self.unlabelled_rows < 1:
            raise LichenError(f"unlabelled_rows is {self.unlabelled_rows}", where="ScarceLabels", fix="use 1 or more")

    def shape(self, client: int) -> Hashable:
        """The local source's."""
        return self.local.shape(client)

    def cost(self, client: int) -> int:
        """The local source's, for as many rows as a batch has here."""
        return -(-self.local.cost(client) * (self.local.batch_size + self.unlabelled_rows) // self.local.batch_size)

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """As many steps as the busiest of these clients takes; others go inactive after theirs."""
        shapes = {self.local.shape(c) for c in clients}
        if len(shapes) > 1:
            raise LichenError("clients of different shapes cannot stand side by side", where="block")
        shards = [self.local.shards[c] for c in clients]
        sizes = (self.local.batch_size, self.unlabelled_rows)
        draws = (stream, _replaced if self.replacement else stream)
        batches = [
            [
                _picked(rows, draw(len(rows), size, numpy_generator(seed, c, purpose)))
                for rows, size, purpose, draw in zip(_labelled_and_not(shard), sizes, _PURPOSES, draws, strict=True)
            ]
            for c, shard in zip(clients, shards, strict=True)
        ]
        counts = [self.local.steps_of(c, shard) for c, shard in zip(clients, shards, strict=True)]
        nothing = [np.full(size, -1, np.int64) for size in sizes]
        for step in range(max(counts, default=0)):
            active = [step < count for count in counts]
            slots: list[Slot] = []
            for shard, parts, on in zip(shards, batches, active, strict=True):
                numbers = [next(part) for part in parts] if on else nothing
                slots.append(tuple((shard, some) for some in numbers))
            yield assemble(slots, active, width=self.local.width_of(shards[0]), pad=self.local.pad)

    def unlabelled(self, client: int) -> Iterator[Batch]:
        """All unlabelled rows of one client, each once and in order, in batches as wide as those of :meth:`batches`."""
        shard, size = self.local.shards[client], self.unlabelled_rows
        _, rows = _labelled_and_not(shard)
        for at in range(0, len(rows), size):
            some = np.full(size, -1, np.int64)
            some[: len(rows[at : at + size])] = rows[at : at + size]
            yield assemble([((shard, some),)], [True], width=self.local.width_of(shard), pad=self.local.pad)


def _labelled_and_not(shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows with and without a label."""
    if not isinstance(shard.labels, np.ndarray):
        raise LichenError("rows have no class", where="ScarceLabels", fix="use task: classify")
    return np.flatnonzero(shard.labels >= 0), np.flatnonzero(shard.labels < 0)


def _replaced(size: int, take: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """As :func:`lichen.data.batches.collate.stream`, with replacement; -1 where there is no row at all."""
    while True:
        yield generator.integers(0, size, take) if size else np.full(take, -1, np.int64)


def _picked(rows: np.ndarray, positions: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Row numbers from places among them, -1 where there is none."""
    known = np.append(rows, -1)
    return (known[place] for place in positions)


def hide(shard: Shard, keep: int, *, seed: int, client: int) -> Shard:
    """The shard with ``keep`` labels left, drawn evenly from its classes where there are enough; the others are -100.

    Args:
        shard: Rows with a class.
        keep: Labels left.
        seed: Drawn from it and the client.
        client: Whose rows they are.

    Raises:
        LichenError: if the shard's rows have no class.
    """
    labelled, _ = _labelled_and_not(shard)
    labels_N = np.asarray(shard.labels)
    order = labelled[numpy_generator(seed, client, "labels").permutation(len(labelled))]
    nth: dict[int, int] = {}
    turns = []
    for row in order.tolist():
        label = int(labels_N[row])
        nth[label] = nth.get(label, -1) + 1
        turns.append(nth[label])
    shown = order[np.argsort(np.array(turns, dtype=np.int64), kind="stable")][:keep]
    hidden_N = np.full_like(labels_N, -100)
    hidden_N[shown] = labels_N[shown]
    return replace(shard, labels=hidden_N)
