"""Counts what rows of task prefer take once, before they are learned from: the reference's scores, and own answers.

Each row is scored by the model that training begins from when a batch of its client is first asked for, whatever the
loss. Where the model's own answers stand for rejected ones, they are written before: a token at a time, each from all
that stands before it. How long they will be is not known; they are counted as long as a person's.

Legend: N rows of a client.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from safetensors.torch import save

from lichen.data.batches.rows import Ragged, TextShard
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.parts import validators_of
from lichen.recipes.assemble.preference.stored import KEY, KEY_BYTES
from lichen.recipes.assemble.workload import Workload
from lichen.recipes.plan.workload import WorkItem, evaluated

__all__ = ["ANSWERS", "NOTE", "ONCE", "once", "once_bytes"]

REFERENCE, ANSWERS = "reference", "own answers"
ONCE = (REFERENCE, ANSWERS)
"""Columns of a plan that no round is in."""

NOTE = "own answers are counted as long as a person's; they end sooner or later"


def once(experiment: Experiment, invited: Sequence[Sequence[int]], columns: Sequence[str]) -> dict[str, WorkItem]:
    """What is done once with every row that some column asks for; nothing where no preferences are learned.

    Args:
        experiment: The recipe's, whose rows have scores, and second answers as long as a person's.
        invited: The clients of every round.
        columns: Those that are run.
    """
    recipe = experiment.recipe
    if not recipe.prefers:
        return {}
    shards = list(_shards(experiment, invited, columns))
    scored = sum((evaluated(experiment.evaluating([shard]), (0,)) for shard in shards), Workload())
    found = {REFERENCE: WorkItem(kind="score", workload=scored, clients=len(shards))}
    if recipe.preference.writes_answers:
        written = sum(map(_written, shards), Workload())
        found[ANSWERS] = WorkItem(kind="score", workload=written, clients=written.labelled)
    return found


def once_bytes(experiment: Experiment, invited: Sequence[Sequence[int]], columns: Sequence[str]) -> int:
    """Bytes of the files in which clients keep that; arguments as in :func:`once`."""
    if not experiment.recipe.prefers:
        return 0
    total, key = 0, {KEY: torch.zeros(KEY_BYTES, dtype=torch.uint8)}
    for shard in _shards(experiment, invited, columns):
        total += len(save({"scores": torch.zeros(shard.size, 2), **key}))
        if experiment.recipe.preference.writes_answers:
            tokens = sum(map(len, shard.input_ids))
            ids = {name: torch.zeros(tokens, dtype=torch.int32) for name in ("ids", "labels")}
            total += len(save({**ids, "offsets": torch.zeros(shard.size + 1, dtype=torch.int64), **key}))
    return total


def _shards(experiment: Experiment, invited: Sequence[Sequence[int]], columns: Sequence[str]) -> Iterator[TextShard]:
    """The rows that some column asks for, those that clients share once."""
    rows, everyone = experiment.clients, range(len(experiment.server.roster))
    apart = bool({"alone", "alone_best", "pooled", "personal"} & set(columns))
    trained = everyone if apart else sorted({client for who in invited for client in who})
    judges = everyone if apart else validators_of(experiment.server)
    for part, clients in ((rows.train, trained), (rows.valid, judges), (rows.test, everyone)):
        for shard in {id(part[client]): part[client] for client in clients}.values():
            if isinstance(shard, TextShard) and shard.size:
                yield shard


def _written(shard: TextShard) -> Workload:
    """Each token of an answer is asked for behind all before it, with a place of its own."""
    total = Workload()
    assert isinstance(shard.labels, Ragged)
    for labels_T in shard.labels:
        start = max(int(np.argmax(np.asarray(labels_T) != -100)), 1)
        length_S = np.arange(start, len(labels_T)) + 1.0
        steps = len(length_S)
        total += Workload(
            rows=steps, tokens=float(length_S.sum()), labelled=steps, square=float(np.square(length_S).sum())
        )
    return total
