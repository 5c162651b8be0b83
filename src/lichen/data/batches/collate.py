"""Collates rows of several clients into one batch of fixed shape, and orders the rows of an epoch.

Padding rows attend to one padding token, because a softmax over nothing is not a number.

Legend: C clients, B rows of a batch, T tokens, F features, R = C * B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from lichen.core.contracts.model import Batch
from lichen.core.conventions.labels import no_label
from lichen.data.batches.rows import ArrayShard, Ragged, Shard, TextShard

__all__ = ["Slot", "assemble", "count_rows_tokens", "passes", "stream"]

Slot = Sequence[tuple[Shard, np.ndarray]]
"""What one client puts into a batch: row numbers of shards one below the other; -1 is a padding row."""

_Rows = dict[int, np.ndarray]
"""Rows by their place in the batch, counted through all clients and rising."""


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
    learns_tokens = isinstance(first, TextShard) and first.kind == "lm"
    if not learns_tokens:
        like = np.asarray(first.labels)
        real = like.dtype.kind == "f"
        kind = np.float32 if real else np.int64
        batch["labels_CB"] = np.full((clients, rows, *like.shape[1:]), no_label(real=real), kind)
    tokens: _Rows = {}
    labels: _Rows = {}
    for c, slot in enumerate(slots):
        at = 0
        for part, (shard, numbers) in enumerate(slot):
            shared = public and part > 0
            _place(batch, c, at, shard, numbers, shared=shared)
            if isinstance(shard, TextShard):
                here = [(c * rows + b, row) for b, row in enumerate(numbers.tolist(), at) if row >= 0]
                Ragged.of(shard.input_ids).cut(here, width, into=tokens)
                if learns_tokens and not shared:
                    Ragged.of(shard.labels).cut(here, width, into=labels)
            at += len(numbers)
    if isinstance(first, TextShard):
        shape_CBT = (clients, rows, width)
        batch["input_ids_CBT"], real_CBT = _laid(tokens, shape_CBT, fill=pad)
        real_CBT[:, :, 0] = True
        batch["attention_mask_CBT"] = real_CBT.astype(np.int64)
        if learns_tokens:
            batch["labels_CBT"], _ = _laid(labels, shape_CBT, fill=-100)
        if first.compared is not None:
            batch |= _compared(slots, shape_CBT, pad=pad)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _compared(slots: Sequence[Slot], shape_CBT: tuple[int, int, int], *, pad: int) -> dict[str, np.ndarray]:
    """What each row is compared with: whether it is good, its second answer, and what the reference says of both."""
    clients, each, width = shape_CBT
    good_CB = np.full((clients, each), -100, np.int64)
    reference_CB2 = np.zeros((clients, each, 2), np.float32)
    tokens: _Rows = {}
    labels: _Rows = {}
    seconds = scored = False
    for c, slot in enumerate(slots):
        at = 0
        for shard, numbers in slot:
            compared = shard.compared if isinstance(shard, TextShard) else None
            span, real, rows = slice(at, at + len(numbers)), numbers >= 0, numbers[numbers >= 0]
            at += len(numbers)
            if compared is None or not len(rows):
                continue
            good_CB[c, span][real] = compared.good_N[rows]
            if compared.reference is not None:
                reference_CB2[c, span][real], scored = compared.reference()[rows], True
            if compared.second is not None:
                here = [(c * each + b, row) for b, row in enumerate(numbers.tolist(), span.start) if row >= 0]
                second, seconds = compared.second(), True
                Ragged.of(second.input_ids).cut(here, width, into=tokens)
                Ragged.of(second.labels).cut(here, width, into=labels)
    found: dict[str, np.ndarray] = {"good_CB": good_CB, **({"reference_CB2": reference_CB2} if scored else {})}
    if seconds:
        found["second_ids_CBT"], real_CBT = _laid(tokens, shape_CBT, fill=pad)
        real_CBT[:, :, 0] = True
        found["second_mask_CBT"] = real_CBT.astype(np.int64)
        found["second_labels_CBT"], _ = _laid(labels, shape_CBT, fill=-100)
    return found


def _place(batch: dict[str, np.ndarray], c: int, at: int, shard: Shard, numbers: np.ndarray, *, shared: bool) -> None:
    """What is one number a row, and rows without tokens."""
    real = numbers >= 0
    span = slice(at, at + len(numbers))
    if not shared:
        batch["index_CB"][c, span] = numbers
    if shared or shard.answer is not None:
        batch["answer_CB"][c, span][real] = numbers[real] if shard.answer is None else shard.answer[numbers[real]]
    if "labels_CB" in batch and not shared:
        batch["labels_CB"][c, span][real] = np.asarray(shard.labels)[numbers[real]]
    if isinstance(shard, ArrayShard):
        batch["x_CBF"][c, span][real] = shard.x[numbers[real]]


def _laid(rows: _Rows, shape_CBT: tuple[int, int, int], *, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """``(numbers, which are real)`` of that shape, int64 and bool: all rows are laid down in one pass."""
    clients, each, width = shape_CBT
    length_R = np.zeros(clients * each, np.int64)
    length_R[list(rows)] = [len(row) for row in rows.values()]
    real_RT = np.arange(width) < length_R[:, None]
    laid_RT = np.full((clients * each, width), fill, np.int64)
    if rows:
        laid_RT[real_RT] = np.concatenate(list(rows.values()))
    return laid_RT.reshape(shape_CBT), real_RT.reshape(shape_CBT)


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


def passes(size: int, take: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of ``take`` row numbers, pass after pass without end; a pass's last batch is filled up with -1.

    >>> drawn = passes(5, 2, np.random.default_rng(0))
    >>> sorted(np.concatenate([next(drawn) for _ in range(3)]).tolist())
    [-1, 0, 1, 2, 3, 4]
    """
    while True:
        order = generator.permutation(size)
        for at in range(0, size, take):
            rows = order[at : at + take]
            yield np.concatenate([rows, np.full(take - len(rows), -1, np.int64)])


def count_rows_tokens(batch: Batch) -> int:
    """Attended tokens, or rows where there are none, of active clients; padding rows left out."""
    real_CB = batch["index_CB"] >= 0
    if "answer_CB" in batch:
        real_CB = real_CB | (batch["answer_CB"] >= 0)
    real_CB = real_CB & batch["active_C"][:, None]
    if "attention_mask_CBT" in batch:
        second = int((batch["second_mask_CBT"] * real_CB[:, :, None]).sum()) if "second_mask_CBT" in batch else 0
        return int((batch["attention_mask_CBT"] * real_CB[:, :, None]).sum()) + second
    return int(real_CB.sum())
