"""Put rows of several clients into one batch of fixed shape, and say in which order rows come.

Padding rows attend to one padding token, because a softmax over nothing is not a number.

Legend: C clients, B rows of a batch, T tokens, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from lichen.core.contracts import Batch
from lichen.data.rows import ArrayShard, Shard, TextShard

__all__ = ["Slot", "assemble", "count_rows_tokens", "stream"]

Slot = Sequence[tuple[Shard, np.ndarray]]
"""What one client puts into a batch: row numbers of shards one below the other; -1 is a padding row."""


def assemble(slots: Sequence[Slot], active: Sequence[bool], *, width: int, pad: int, public: bool = False) -> Batch:
    """Stack the clients' slots into one batch.

    Args:
        slots: One a client, all with equally many rows and shards of one kind.
        active: Which clients have such a step.
        width: Tokens of a row; longer rows are cut on the right. Not used for rows without tokens.
        pad: Padding token.
        public: Every part after a slot's first is of a public shard: its rows carry answers, the row
            number where the shard names none, instead of labels and positions.
    """
    clients, rows = len(slots), sum(len(numbers) for _, numbers in slots[0])
    first = slots[0][0][0]
    batch: dict[str, np.ndarray] = {
        "active_C": np.array(active, bool),
        "index_CB": np.full((clients, rows), -1, np.int64),
    }
    if public or any(shard.answer is not None for slot in slots for shard, _ in slot):
        batch["answer_CB"] = np.full((clients, rows), -1, np.int64)
    if isinstance(first, ArrayShard):
        batch["x_CBF"] = np.zeros((clients, rows, *first.x.shape[1:]), np.float32)
    else:
        batch["input_ids_CBT"] = np.full((clients, rows, width), pad, np.int64)
        batch["attention_mask_CBT"] = np.zeros((clients, rows, width), np.int64)
        batch["attention_mask_CBT"][:, :, 0] = 1
    if isinstance(first, TextShard) and first.kind == "lm":
        batch["labels_CBT"] = np.full((clients, rows, width), -100, np.int64)
    else:
        batch["labels_CB"] = np.full((clients, rows), -100, np.int64)
    for c, slot in enumerate(slots):
        at = 0
        for part, (shard, numbers) in enumerate(slot):
            _place(batch, c, at, shard, numbers, shared=public and part > 0)
            at += len(numbers)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _place(batch: dict[str, np.ndarray], c: int, at: int, shard: Shard, numbers: np.ndarray, *, shared: bool) -> None:
    real = np.flatnonzero(numbers >= 0)
    rows, slots = numbers[real], real + at
    if not shared:
        batch["index_CB"][c, slots] = rows
    if shared or shard.answer is not None:
        batch["answer_CB"][c, slots] = rows if shard.answer is None else shard.answer[rows]
    if "labels_CB" in batch and not shared:
        batch["labels_CB"][c, slots] = np.asarray(shard.labels)[rows]
    if isinstance(shard, ArrayShard):
        batch["x_CBF"][c, slots] = shard.x[rows]
        return
    width = batch["input_ids_CBT"].shape[2]
    for row, b in zip(rows.tolist(), slots.tolist(), strict=True):
        tokens = shard.input_ids[row][:width]
        batch["input_ids_CBT"][c, b, : len(tokens)] = tokens
        batch["attention_mask_CBT"][c, b, : len(tokens)] = 1
        if "labels_CBT" in batch and not shared:
            batch["labels_CBT"][c, b, : len(tokens)] = shard.labels[row][:width]


def stream(size: int, take: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of ``take`` row numbers out of one permutation after another, without end.

    A shard smaller than a batch comes whole every time, filled up with -1.
    """
    fill = np.full(max(take - size, 0), -1, np.int64)
    left = np.empty(0, np.int64)
    while True:
        while len(left) < min(size, take):
            left = np.concatenate([left, generator.permutation(size)])
        yield np.concatenate([left[: min(size, take)], fill])
        left = left[take:]


def count_rows_tokens(batch: Batch) -> int:
    """Attended tokens, or rows where there are none, of active clients; padding rows left out."""
    real_CB = batch["index_CB"] >= 0
    if "answer_CB" in batch:
        real_CB = real_CB | (batch["answer_CB"] >= 0)
    real_CB = real_CB & batch["active_C"][:, None]
    if "attention_mask_CBT" in batch:
        return int((batch["attention_mask_CBT"] * real_CB[:, :, None]).sum())
    return int(real_CB.sum())
