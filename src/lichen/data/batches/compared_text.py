"""Rows of preferences as token rows: an answer, and another one to the same prompt.

Of a conversation only the last answer is learned. A mismatched row has the prompt of its own row and the answer of
the next one of the same client that differs, as the estimate of the mean reward in KTO needs them: which row that is
follows from the client's own rows alone, so that it can be scored once.

Legend: N rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from lichen.data.batches.rows import Compared, Ragged, TextShard
from lichen.data.sources.record import Record

__all__ = ["mismatched", "preference_shard"]


def preference_shard(
    records: Sequence[Record], encode: Callable[[Sequence[Record]], TextShard], *, good_N: np.ndarray, turns: bool
) -> TextShard:
    """Rows with their rejected answers, where they have some; raises as ``encode``.

    Args:
        records: The rows.
        encode: Token rows of language modelling, such as :func:`lichen.data.batches.token_cache.lm_shard` gives.
        good_N: 1 where a row is good, 0 where it is bad.
        turns: Rows are conversations, of which only the last answer is to be learned.
    """

    def answers(rows: Sequence[Record]) -> TextShard:
        shard = encode(rows)
        return _last_spans(shard) if turns else shard

    chosen = answers(records)
    if not any(record.rejected for record in records):
        return replace(chosen, compared=Compared(good_N=good_N))
    second = answers([with_answer(record, record.rejected) for record in records])
    return replace(chosen, compared=Compared(good_N=good_N, second=lambda: second))


def with_answer(record: Record, answer: str) -> Record:
    """The row with another answer."""
    turns = (*record.messages[:-1], {"role": "assistant", "content": answer}) if record.messages else ()
    return replace(record, text=answer, messages=turns)


def _last_spans(shard: TextShard) -> TextShard:
    """The same rows, of each the labels after its last token without one."""
    labels = []
    for row_T in shard.labels:
        free_T = np.flatnonzero(row_T == -100)
        learned = np.flatnonzero(row_T != -100)
        last = int(learned[-1]) if len(learned) else -1
        before = free_T[free_T < last]
        begin = int(before[-1]) + 1 if len(before) else 0
        labels.append(np.where(np.arange(len(row_T)) < begin, -100, row_T).astype(row_T.dtype))
    return replace(shard, labels=labels)


def mismatched(shard: TextShard, *, max_length: int) -> TextShard:
    """Each row's prompt with the answer of the client's next row whose answer is another one; cut on the right.

    Where all answers are the same the row is its prompt, and nothing of it has a label.
    """
    ids, labels = Ragged.of(shard.input_ids), Ragged.of(shard.labels)
    start_N = [int((row_T != -100).argmax()) if (row_T != -100).any() else len(row_T) for row_T in labels]
    answers = [row_T[start:] for row_T, start in zip(ids, start_N, strict=True)]
    rows, targets = [], []
    for n in range(shard.size):
        turns = ((n + step) % shard.size for step in range(1, shard.size))
        other = next((m for m in turns if not np.array_equal(answers[m], answers[n])), None)
        prompt = ids[n][: max(start_N[n], 1)]
        answer = ids[n][:0] if other is None else answers[other]
        learned = labels[n][:0] if other is None else labels[other][start_N[other] :]
        rows.append(np.concatenate([prompt, answer])[:max_length])
        targets.append(np.concatenate([np.full(len(prompt), -100, labels.flat_T.dtype), learned])[:max_length])
    return TextShard(rows, labels=targets, kind="lm")
