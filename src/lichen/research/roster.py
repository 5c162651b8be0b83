"""A million clients over shared flat arrays, cut into shards when asked.

Research: no recipe and no public name reaches this module.

Nothing is held per client but where its rows begin, so a roster costs eight bytes a client and eight a
row beside the rows themselves, and those may be files mapped into memory.

Legend: N clients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final, overload

import numpy as np

from lichen.core.errors import LichenError
from lichen.data.batches.rows import Shard

__all__ = ["Roster"]


@final
class Roster(Sequence[Shard]):
    """Shards of many clients, in place of a tuple of them.

    Args:
        rows: All clients' rows in one shard, client by client.
        offset_N1: Where each client's rows begin, and where the last one's end: ``(N + 1,)``.

    Raises:
        LichenError: if an offset falls, or they do not cover the rows.

    >>> from lichen.data.batches.rows import Ragged, TextShard
    >>> ids = Ragged(np.array([5, 6, 7, 8]), np.array([0, 2, 3, 4]))
    >>> roster = Roster(TextShard(ids, labels=np.array([0, 1, 0]), kind="classify"), np.array([0, 1, 3]))
    >>> len(roster), roster.size_N.tolist(), [row.tolist() for row in roster[1].input_ids]
    (2, [1, 2], [[7], [8]])
    """

    __slots__ = ("offset_N1", "rows", "size_N")

    def __init__(self, rows: Shard, offset_N1: np.ndarray) -> None:
        self.rows, self.offset_N1 = rows, np.asarray(offset_N1)
        self.size_N: np.ndarray = self.offset_N1[1:] - self.offset_N1[:-1]
        """Rows of every client: what a sampler weighs them by."""
        if not len(self.offset_N1) or self.offset_N1[0] != 0 or self.offset_N1[-1] != rows.size:
            raise LichenError(f"client offsets do not cover the {rows.size} rows", where="roster")
        if len(self.size_N) and self.size_N.min() < 0:
            raise LichenError("client offsets fall", where="roster", fix="sort the rows by client")

    def __len__(self) -> int:
        return len(self.size_N)

    @overload
    def __getitem__(self, client: int) -> Shard: ...
    @overload
    def __getitem__(self, client: slice) -> tuple[Shard, ...]: ...
    def __getitem__(self, client: int | slice) -> Shard | tuple[Shard, ...]:
        if isinstance(client, slice):
            return tuple(self[c] for c in range(len(self))[client])
        if not -len(self) <= client < len(self):
            raise IndexError(client)
        at = client % len(self)
        return self.rows.between(self.offset_N1.item(at), self.offset_N1.item(at + 1))

    def __iter__(self) -> Iterator[Shard]:
        return (self[client] for client in range(len(self)))
