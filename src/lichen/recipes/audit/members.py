"""Audits a finished run: do the model's losses tell rows that were trained on from rows that were not?

Members are clients' training rows, others their test rows, both as the run split them. What is asked is the model
that leaves, which whoever has it can ask.

Legend: N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lichen.audit.row_scores import row_scores
from lichen.audit.separation import Separation, separation
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import Shard
from lichen.recipes.assemble.experiment import Experiment

__all__ = ["ATTACKS", "membership"]

ATTACKS = {
    "loss": "loss",
    "loss, reference": "loss less the bare model's",
    "min_k": "Min-K %",
    "min_k, reference": "Min-K % less the bare model's",
}
"""Scores by name, and what they are called."""


def membership(experiment: Experiment, shared: Shared, *, rows: int, seed: int) -> dict[str, Separation]:
    """What each score tells, by its name in :data:`ATTACKS`; Min-K % of language models only.

    Args:
        experiment: The run's, opened again.
        shared: What it has learned.
        rows: Of each kind at most, as many of every client as go into that.
        seed: Of the intervals.

    Raises:
        LichenError: if a side has no labelled row.
    """
    clients, found = experiment.clients, []
    for shards in (clients.train, clients.test):
        own = _some(shards, max(1, rows // max(len(shards), 1)))
        after, before = (_scores(experiment, own, tensors) for tensors in (shared, experiment.start))
        found.append(after | {f"{name}, reference": after[name] - before[name] for name in after})
    member, other = found
    if not member.keys() == other.keys() or not all(len(x) for x in (*member.values(), *other.values())):
        raise LichenError("training or test rows have no label", where="data", fix="audit a run with both")
    return {name: separation(member[name], other[name], seed=seed) for name in ATTACKS if name in member}


def _some(shards: Sequence[Shard], each: int) -> list[Shard]:
    return [shard.between(0, min(each, shard.size)) for shard in shards]


def _scores(experiment: Experiment, shards: Sequence[Shard], shared: Shared) -> dict[str, NDArray[np.float64]]:
    source = experiment.evaluating(shards)

    def batches() -> Iterator[Batch]:
        for client in range(len(shards)):
            yield from source.batches((client,), 0)

    return row_scores(experiment.model, shared.trainable, shared.fixed, batches())
