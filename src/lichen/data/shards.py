"""Fixed-shape masked batches of many clients side by side: the sources a client work folds over.

One law: what client c sees depends on its own rows, its own number and the seed, never on its company.
The batches of a client alone are, bit for bit, its slice of any block's batches, wherever it is active.
So padding follows from the client's own rows, shuffling from ``(seed, client)``, and a client that has
run out of steps goes on as an inactive slot.

Legend: C clients, B rows of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import final

import numpy as np

from lichen.core.contracts import Batch
from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator
from lichen.data.assemble import Slot, assemble, count_rows_tokens, stream
from lichen.data.rows import ArrayShard, Shard, TextShard, pooled

__all__ = [
    "ArrayShard",
    "EvalSource",
    "MixedSource",
    "Shard",
    "TextShard",
    "TrainSource",
    "count_rows_tokens",
    "pooled",
]

Shards = Mapping[int, Shard] | Sequence[Shard]


def _held(shards: Shards, client: int) -> Shard:
    try:
        return shards[client]
    except (KeyError, IndexError):
        raise LichenError(f"client {client} has no data here", where="data", fix="ask clients of the roster") from None


def _longest(shard: TextShard, rows: Sequence[int] | np.ndarray | None = None) -> int:
    chosen = shard.input_ids if rows is None else [shard.input_ids[int(i)] for i in rows if i >= 0]
    return max((len(row) for row in chosen), default=1)


def _round_up(length: int, multiple: int, most: int | None) -> int:
    width = -(-length // multiple) * multiple
    return width if most is None else min(width, most)


def _check(source: object, **atleast: int | None) -> None:
    for name, value in atleast.items():
        if value is not None and value < 1:
            raise LichenError(f"{name} is {value}", where=type(source).__name__, fix="use a number above 0")


def _check_block(shapes: Sequence[Hashable]) -> None:
    if len(set(shapes)) > 1:
        raise LichenError(
            "clients of different shapes cannot stand side by side", where="block", fix="group them by shape()"
        )


@final
@dataclass(frozen=True, slots=True, eq=False)
class TrainSource:
    """Shuffled batches, a fixed number of steps a client, over epochs of its own permutations.

    Attributes:
        shards: Rows by client.
        batch_size: Rows of a batch.
        steps: Steps of every client, or of each; clients without rows take none.
        pad: Padding token.
        width_multiple: Widths are rounded up to this; rows of a batch share the client's one width.
        max_length: Widest a batch may be; longer rows are cut on the right.
        fixed_width: One width for all clients instead, so that all share a shape.
    """

    shards: Shards
    _: KW_ONLY
    batch_size: int
    steps: int | Mapping[int, int]
    pad: int = 0
    width_multiple: int = 16
    max_length: int | None = None
    fixed_width: int | None = None

    def __post_init__(self) -> None:
        _check(self, batch_size=self.batch_size, width_multiple=self.width_multiple)
        _check(self, max_length=self.max_length, fixed_width=self.fixed_width)

    def width(self, client: int) -> int:
        """Tokens of this client's batches; 0 for rows without tokens."""
        shard = _held(self.shards, client)
        if isinstance(shard, ArrayShard):
            return 0
        return self.fixed_width or _round_up(_longest(shard), self.width_multiple, self.max_length)

    def steps_of(self, client: int) -> int:
        """Steps this client takes."""
        if _held(self.shards, client).size == 0:
            return 0
        return self.steps if isinstance(self.steps, int) else self.steps.get(client, 0)

    def shape(self, client: int) -> Hashable:
        """The width, or the shape of a row without tokens."""
        shard = _held(self.shards, client)
        return shard.x.shape[1:] if isinstance(shard, ArrayShard) else (self.width(client),)

    def rows(self, client: int, seed: int) -> Iterator[np.ndarray]:
        """Endless row numbers ``(batch_size,)`` of one client, -1 for padding rows."""
        size = _held(self.shards, client).size
        return stream(size, self.batch_size, numpy_generator(seed, client, "shuffle"))

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """As many steps as the busiest of these clients takes; others go inactive after theirs."""
        _check_block([self.shape(c) for c in clients])
        held = [_held(self.shards, c) for c in clients]
        streams = [self.rows(c, seed) for c in clients]
        counts = [self.steps_of(c) for c in clients]
        nothing = np.full(self.batch_size, -1, np.int64)
        for step in range(max(counts, default=0)):
            active = [step < count for count in counts]
            numbers = [next(s) if on else nothing for s, on in zip(streams, active, strict=True)]
            slots = [((shard, n),) for shard, n in zip(held, numbers, strict=True)]
            yield assemble(slots, active, width=self.width(clients[0]), pad=self.pad)


@final
@dataclass(frozen=True, slots=True, eq=False)
class MixedSource:
    """A training source whose batches also hold rows of a public shard, with answers in place of labels.

    Attributes:
        local: The clients' own rows.
        public: Rows every client knows; its ``answer``, or else the row number, points into the answers.
        public_rows: Public rows of a batch, below the local ones.
    """

    local: TrainSource
    _: KW_ONLY
    public: Shard
    public_rows: int

    def __post_init__(self) -> None:
        _check(self, public_rows=self.public_rows, public=self.public.size)

    def _width(self, client: int) -> int:
        if isinstance(self.public, ArrayShard) or self.local.fixed_width:
            return self.local.width(client)
        shared = _round_up(_longest(self.public), self.local.width_multiple, self.local.max_length)
        return max(self.local.width(client), shared)

    def shape(self, client: int) -> Hashable:
        """The wider of the client's and the public rows' width, or the shape of a row without tokens."""
        shard = _held(self.local.shards, client)
        return shard.x.shape[1:] if isinstance(shard, ArrayShard) else (self._width(client),)

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """The local source's steps, each with ``public_rows`` rows more, drawn from ``(seed, client)``."""
        _check_block([self.shape(c) for c in clients])
        held = [_held(self.local.shards, c) for c in clients]
        own = [self.local.rows(c, seed) for c in clients]
        public = [stream(self.public.size, self.public_rows, numpy_generator(seed, c, "public")) for c in clients]
        counts = [self.local.steps_of(c) for c in clients]
        nothing = np.full(self.local.batch_size, -1, np.int64), np.full(self.public_rows, -1, np.int64)
        for step in range(max(counts, default=0)):
            active = [step < count for count in counts]
            slots: list[Slot] = []
            for shard, mine, shared, on in zip(held, own, public, active, strict=True):
                numbers = (next(mine), next(shared)) if on else nothing
                slots.append(((shard, numbers[0]), (self.public, numbers[1])))
            yield assemble(slots, active, width=self._width(clients[0]), pad=self.local.pad, public=True)


@final
@dataclass(frozen=True, slots=True, eq=False)
class EvalSource:
    """Every row once: the longest first, each batch as wide as a few standard widths allow.

    Widths are ``width_multiple`` times 1, 2, 3, 4, 6, 8, 12, ...: at most half is padding and few
    widths occur, so that clients find company. In a block the widths are gone through from the widest
    down; at each, clients without a batch of that width are inactive.

    Attributes:
        shards: Rows by client; none at all is fine.
        batch_size: Rows of a batch.
        pad: Padding token.
        width_multiple: The narrowest width.
        max_length: Widest a batch may be; longer rows are cut on the right.
    """

    shards: Shards
    _: KW_ONLY
    batch_size: int
    pad: int = 0
    width_multiple: int = 16
    max_length: int | None = None

    def __post_init__(self) -> None:
        _check(self, batch_size=self.batch_size, width_multiple=self.width_multiple, max_length=self.max_length)

    def _standard(self, length: int) -> int:
        units = -(-length // self.width_multiple)
        power = 1 << (units - 1).bit_length()
        width = self.width_multiple * (power * 3 // 4 if power >= 4 and units <= power * 3 // 4 else power)
        return width if self.max_length is None else min(width, self.max_length)

    def _plan(self, client: int) -> dict[int, list[np.ndarray]]:
        """The client's batches (row numbers, -1 for padding) by width, widest first."""
        shard = _held(self.shards, client)
        order = np.arange(shard.size)
        if isinstance(shard, TextShard) and shard.size:
            order = np.argsort([-len(row) for row in shard.input_ids], kind="stable")
        plan: dict[int, list[np.ndarray]] = {}
        for at in range(0, shard.size, self.batch_size):
            rows = order[at : at + self.batch_size]
            width = self._standard(_longest(shard, rows)) if isinstance(shard, TextShard) else 0
            fill = np.full(self.batch_size - len(rows), -1, np.int64)
            plan.setdefault(width, []).append(np.concatenate([rows, fill]))
        return plan

    def shape(self, client: int) -> Hashable:
        """The widths that occur, or a row's shape, and the number of batches to within a factor of two."""
        shard = _held(self.shards, client)
        plan = self._plan(client)
        kind = shard.x.shape[1:] if isinstance(shard, ArrayShard) else tuple(plan)
        return (kind, sum(len(batches) for batches in plan.values()).bit_length())

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """Batches of these clients; the seed is not used, for nothing is drawn."""
        del seed
        _check_block([self.shape(c) for c in clients])
        held = [_held(self.shards, c) for c in clients]
        plans = [self._plan(c) for c in clients]
        nothing = np.full(self.batch_size, -1, np.int64)
        for width in sorted({w for plan in plans for w in plan}, reverse=True):
            mine = [plan.get(width, []) for plan in plans]
            for step in range(max(len(batches) for batches in mine)):
                active = [step < len(batches) for batches in mine]
                numbers = [batches[step] if on else nothing for batches, on in zip(mine, active, strict=True)]
                slots = [((shard, n),) for shard, n in zip(held, numbers, strict=True)]
                yield assemble(slots, active, width=width, pad=self.pad)
