"""A digest of rows: equal for equal rows in equal order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from lichen.data.batches.rows import ArrayShard, Ragged, Shard
from lichen.data.sources.record import Record
from lichen.data.sources.table import column_of

__all__ = ["records_digest", "shards_digest"]


def records_digest(records: Sequence[Record]) -> str:
    """SHA-256 (64 hex digits) over all that a model may learn of every row, and whose it is.

    The path it was read from is no part of it, nor is when it was written.

    >>> a, b = Record(client="x", text="Yes."), Record(client="x", text="yes.")
    >>> records_digest([a]) == records_digest([a]), records_digest([a]) == records_digest([b])
    (True, False)
    """
    total = hashlib.sha256()
    columns = (column_of(records, field.name) for field in fields(Record) if field.name != "time")
    for client, text, prompt, value, messages, group, features, is_test, rejected, rating in zip(*columns, strict=True):
        label, turns = repr(value), json.dumps([dict(turn) for turn in messages], default=str) if messages else ""
        sizes = f"{len(client)} {len(text)} {len(prompt)} {len(group)} {len(label)} {int(is_test)}\n"
        whole = "".join((sizes, client, text, prompt, group, label, turns, "\n"))
        total.update(whole.encode("utf-8", "surrogatepass"))
        if features is not None:
            _add(total, features)
        if rejected or rating is not None:
            total.update(repr((rejected, rating)).encode("utf-8", "surrogatepass"))
    return total.hexdigest()


def shards_digest(*shards: Sequence[Shard]) -> str:
    """SHA-256 (64 hex digits) over the rows of all clients as the model reads them, and their labels."""
    total = hashlib.sha256()
    for part in shards:
        for shard in part:
            total.update(f"shard of {shard.size}\n".encode())
            for rows in (shard.x if isinstance(shard, ArrayShard) else shard.input_ids, shard.labels):
                if isinstance(rows, np.ndarray):
                    _add(total, rows)
                else:
                    some = Ragged.of(rows)
                    _add(total, some.length_N)
                    _add(total, some.flat_T[some.offset_N1[0] : some.offset_N1[-1]])
    return total.hexdigest()


def _add(total: hashlib._Hash, array: np.ndarray) -> None:
    """Integers of any width are the same numbers."""
    plain = array.astype(np.int64) if array.dtype.kind in "iu" else np.ascontiguousarray(array)
    total.update(f"{plain.dtype} {plain.shape}\n".encode() + plain.tobytes())
