"""Public labels in a teacher's place: the control that has no foundation model.

A teacher's head is fitted on public labelled rows that no client has, the server takes steps before the first round,
and every local step has more rows. Here the student is given those labels themselves, in as many steps of as many rows:
what a teacher is worth beyond that is the foundation model's.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lichen.core.tree import Tree
from lichen.data.batches.shards import ArrayShard, Shard
from lichen.recipes.assemble.open import LoadedExperiment

__all__ = ["public_labels"]


def public_labels(loaded: LoadedExperiment) -> tuple[Tree, Shard, int]:
    """``(answers.*, rows, bytes of the rows)`` of the public labelled rows, each answered by its own label.

    The rows themselves have no label any more, so that none is learned twice; ``answers.prob`` ``(N, 1)`` float16 is 1.
    The bytes are of one client's copy, without the labels, which ride in every job as any answers do.
    """
    records, index = loaded.public_split.labelled, {label: i for i, label in enumerate(loaded.classes)}
    narrow = torch.int8 if len(loaded.classes) <= 128 else torch.int16
    answers = {
        "answers.index": torch.tensor([[index[str(record.label)]] for record in records], dtype=narrow),
        "answers.prob": torch.ones(len(records), 1, dtype=torch.float16),
    }
    rows = loaded.make([replace(record, label=None) for record in records])
    size = rows.x.nbytes if isinstance(rows, ArrayShard) else sum(len(record.text.encode()) for record in records)
    return answers, rows, int(size)
