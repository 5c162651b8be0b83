"""Cuts the rows of one step into micro-batches, which walk through a pipeline of hosts one after another.

References: those of :mod:`lichen.clients.pipeline.schedule`.

Legend: C clients, B rows, T tokens, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lichen.core.contracts.client import Source

__all__ = ["Rows", "labelled", "micro_batches", "one_by_one", "scoring"]

Rows = dict[str, Tensor]
"""One micro-batch: ``ids_BT`` and ``labels_BT``, int32, and ``length_B``, int64."""


def micro_batches(batches: Sequence[Rows], micro: int) -> list[Rows]:
    """One step's rows, cut into so many micro-batches of about equally many rows.

    Args:
        batches: With ``input_ids_CBT``, ``attention_mask_CBT`` and ``labels_CBT``; rows without tokens are dropped.
        micro: M. Where there are fewer rows, the rest are a row that teaches nothing.
    """
    ids, labels, lengths = list[Tensor](), list[Tensor](), list[int]()
    for batch in batches:
        width_CB = batch["attention_mask_CBT"].sum(-1) * batch["active_C"][:, None]
        for c, b in (width_CB > 0).nonzero().tolist():
            width = int(width_CB[c, b])
            ids.append(batch["input_ids_CBT"][c, b, :width])
            labels.append(batch["labels_CBT"][c, b, :width])
            lengths.append(width)
    if not ids:
        ids, labels, lengths = [torch.zeros(1, dtype=torch.int64)], [torch.full((1,), -100)], [1]
    while len(ids) < micro:
        ids.append(ids[0])
        labels.append(torch.full_like(labels[0], -100))
        lengths.append(lengths[0])
    parts = torch.tensor_split(torch.arange(len(ids)), micro)
    return [_laid(ids, labels, lengths, part.tolist()) for part in parts]


def _laid(ids: Sequence[Tensor], labels: Sequence[Tensor], lengths: Sequence[int], rows: Sequence[int]) -> Rows:
    width = -(-max(lengths[row] for row in rows) // 8) * 8
    ids_BT = torch.zeros(len(rows), width, dtype=torch.int32)
    labels_BT = torch.full((len(rows), width), -100, dtype=torch.int32)
    for place, row in enumerate(rows):
        ids_BT[place, : lengths[row]], labels_BT[place, : lengths[row]] = ids[row].int(), labels[row].int()
    return {"ids_BT": ids_BT, "labels_BT": labels_BT, "length_B": torch.tensor([lengths[row] for row in rows])}


def labelled(micro: Rows) -> int:
    """How many next tokens of a micro-batch have a label."""
    return int((micro["labels_BT"][:, 1:] != -100).sum())


def one_by_one(source: Source, clients: Sequence[int]) -> tuple[list[Rows], list[int]]:
    """``(micro-batches, whose)``: each batch of these clients as it is, and the place of its client among them."""
    micros, whose = list[Rows](), list[int]()
    for place, client in enumerate(clients):
        for batch in source.batches([client], 0):
            micros += micro_batches([dict(batch)], 1)
            whose.append(place)
    return micros, whose


def scoring(micro: int) -> dict[str, float]:
    """Settings of the jobs that score so many micro-batches."""
    return {"steps": 1, "micro": micro, "train": 0.0, "lr_scale": 1.0}
