"""Batch sources: masked batches of fixed shape for many clients side by side.

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

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator
from lichen.data.batches.collate import Slot, assemble, count_rows_tokens, passes, stream
from lichen.data.batches.rows import ArrayShard, Shard, TextShard, pooled

__all__ = [
    "EVAL_ROWS",
    "ArrayShard",
    "EvalSource",
    "MixedSource",
    "Shard",
    "TextShard",
    "TrainSource",
    "count_rows_tokens",
    "pooled",
    "shard_of",
]

Shards = Mapping[int, Shard] | Sequence[Shard]

EVAL_ROWS = 16
"""Rows of a batch that is only scored."""


def shard_of(shards: Shards, client: int) -> Shard:
    """A client's rows.

    Raises:
        LichenError: if it has none here.
    """
    try:
        return shards[client]
    except (KeyError, IndexError):
        raise LichenError(f"client {client} has no data here", where="data", fix="ask clients of the roster") from None


def _longest(shard: TextShard, rows: np.ndarray | None = None) -> int:
    length_N = shard.longest_N if rows is None else shard.longest_N[rows]
    return int(length_N.max(initial=1))


def _tokens(shard: Shard) -> int:
    return shard.size if isinstance(shard, ArrayShard) else shard.tokens


def _rows_a_step(shard: Shard, rows: int) -> int:
    """Tokens of so many rows of this shard, or rows, as its mean row has them; rounded up."""
    return -(-min(rows, shard.size) * _tokens(shard) // max(shard.size, 1))


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
    """Shuffled batches out of a client's own permutations: a fixed number of steps, or whole passes over its rows.

    Attributes:
        shards: Rows by client.
        batch_size: Rows of a batch.
        steps: Steps of every client, or of each; clients without rows take none.
        pad: Padding token.
        width_multiple: Widths are rounded up to this; rows of a batch share the client's one width.
        max_length: Widest a batch may be; longer rows are cut on the right.
        fixed_width: One width for all clients instead, so that all share a shape.
        epochs: Passes of each client over its rows, in place of ``steps``; a pass's last batch may be smaller.
    """

    shards: Shards
    _: KW_ONLY
    batch_size: int
    steps: int | Mapping[int, int]
    pad: int = 0
    width_multiple: int = 16
    max_length: int | None = None
    fixed_width: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        _check(self, batch_size=self.batch_size, width_multiple=self.width_multiple)
        _check(self, max_length=self.max_length, fixed_width=self.fixed_width, epochs=self.epochs)

    def width(self, client: int) -> int:
        """Tokens of this client's batches; 0 for rows without tokens."""
        return self.width_of(shard_of(self.shards, client))

    def width_of(self, shard: Shard) -> int:
        """:meth:`width` of a shard at hand."""
        if isinstance(shard, ArrayShard):
            return 0
        return self.fixed_width or _round_up(_longest(shard), self.width_multiple, self.max_length)

    def steps_of(self, client: int, shard: Shard | None = None) -> int:
        """Steps this client takes; ``shard`` saves looking its rows up."""
        size = (shard_of(self.shards, client) if shard is None else shard).size
        if size == 0:
            return 0
        if self.epochs is not None:
            return self.epochs * -(-size // self.batch_size)
        return self.steps if isinstance(self.steps, int) else self.steps.get(client, 0)

    def shape(self, client: int) -> Hashable:
        """The width, or the shape of a row without tokens."""
        return self.shape_of(shard_of(self.shards, client))

    def shape_of(self, shard: Shard) -> Hashable:
        """:meth:`shape` of a shard at hand."""
        return shard.x.shape[1:] if isinstance(shard, ArrayShard) else (self.width_of(shard),)

    def cost(self, client: int) -> int:
        """Tokens of its steps, or rows where there are none, its rows taken as long as their mean."""
        if self.epochs is not None:
            return self.epochs * _tokens(shard_of(self.shards, client))
        return self.steps_of(client) * _rows_a_step(shard_of(self.shards, client), self.batch_size)

    def rows(self, client: int, seed: int) -> Iterator[np.ndarray]:
        """Endless row numbers ``(batch_size,)`` of one client, -1 for padding rows."""
        return self.rows_of(shard_of(self.shards, client), client, seed)

    def rows_of(self, shard: Shard, client: int, seed: int) -> Iterator[np.ndarray]:
        """:meth:`rows` of a shard at hand."""
        # A generator's own making costs more than a small client's rows: none is made before it is needed.
        draw = stream if self.epochs is None else passes
        yield from draw(shard.size, self.batch_size, numpy_generator(seed, client, "shuffle"))

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """As many steps as the busiest of these clients takes; others go inactive after theirs."""
        own_shards = [shard_of(self.shards, c) for c in clients]
        _check_block([self.shape_of(shard) for shard in own_shards])
        streams = [self.rows_of(shard, c, seed) for c, shard in zip(clients, own_shards, strict=True)]
        counts = [self.steps_of(c, shard) for c, shard in zip(clients, own_shards, strict=True)]
        nothing = np.full(self.batch_size, -1, np.int64)
        for step in range(max(counts, default=0)):
            active = [step < count for count in counts]
            numbers = [next(s) if on else nothing for s, on in zip(streams, active, strict=True)]
            slots = [((shard, n),) for shard, n in zip(own_shards, numbers, strict=True)]
            yield assemble(slots, active, width=self.width_of(own_shards[0]), pad=self.pad)


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

    def _width(self, shard: Shard) -> int:
        if isinstance(self.public, ArrayShard) or self.local.fixed_width:
            return self.local.width_of(shard)
        shared = _round_up(_longest(self.public), self.local.width_multiple, self.local.max_length)
        return max(self.local.width_of(shard), shared)

    def _shape(self, shard: Shard) -> Hashable:
        return shard.x.shape[1:] if isinstance(shard, ArrayShard) else (self._width(shard),)

    def shape(self, client: int) -> Hashable:
        """The wider of the client's and the public rows' width, or the shape of a row without tokens."""
        return self._shape(shard_of(self.local.shards, client))

    def cost(self, client: int) -> int:
        """The local source's, and that of the public rows beside them."""
        return self.local.cost(client) + self.local.steps_of(client) * _rows_a_step(self.public, self.public_rows)

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """The local source's steps, each with ``public_rows`` rows more, drawn from ``(seed, client)``."""
        own_shards = [shard_of(self.local.shards, c) for c in clients]
        _check_block([self._shape(shard) for shard in own_shards])
        own = [self.local.rows_of(shard, c, seed) for c, shard in zip(clients, own_shards, strict=True)]
        public = [stream(self.public.size, self.public_rows, numpy_generator(seed, c, "public")) for c in clients]
        counts = [self.local.steps_of(c, shard) for c, shard in zip(clients, own_shards, strict=True)]
        nothing = np.full(self.local.batch_size, -1, np.int64), np.full(self.public_rows, -1, np.int64)
        for step in range(max(counts, default=0)):
            active = [step < count for count in counts]
            slots: list[Slot] = []
            for shard, mine, shared, on in zip(own_shards, own, public, active, strict=True):
                numbers = (next(mine), next(shared)) if on else nothing
                slots.append(((shard, numbers[0]), (self.public, numbers[1])))
            yield assemble(slots, active, width=self._width(own_shards[0]), pad=self.local.pad, public=True)


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
        fixed_width: One width for all batches instead, where padding costs nothing.
    """

    shards: Shards
    _: KW_ONLY
    batch_size: int
    pad: int = 0
    width_multiple: int = 16
    max_length: int | None = None
    fixed_width: int | None = None

    def __post_init__(self) -> None:
        _check(self, batch_size=self.batch_size, width_multiple=self.width_multiple, max_length=self.max_length)
        _check(self, fixed_width=self.fixed_width)

    def _standard(self, length: int) -> int:
        if self.fixed_width is not None:
            return self.fixed_width
        units = -(-length // self.width_multiple)
        power = 1 << (units - 1).bit_length()
        width = self.width_multiple * (power * 3 // 4 if power >= 4 and units <= power * 3 // 4 else power)
        return width if self.max_length is None else min(width, self.max_length)

    def _plan(self, shard: Shard) -> dict[int, list[np.ndarray]]:
        """A client's batches (row numbers, -1 for padding) by width, widest first."""
        order = np.arange(shard.size)
        if isinstance(shard, TextShard) and shard.size:
            order = np.argsort(-shard.longest_N, kind="stable")
        plan: dict[int, list[np.ndarray]] = {}
        for at in range(0, shard.size, self.batch_size):
            rows = order[at : at + self.batch_size]
            width = self._standard(_longest(shard, rows)) if isinstance(shard, TextShard) else 0
            fill = np.full(self.batch_size - len(rows), -1, np.int64)
            plan.setdefault(width, []).append(np.concatenate([rows, fill]))
        return plan

    def shape(self, client: int) -> Hashable:
        """The widths that occur, or a row's shape, and the number of batches to within a factor of two."""
        shard = shard_of(self.shards, client)
        return self._shape(shard, self._plan(shard))

    @staticmethod
    def _shape(shard: Shard, plan: Mapping[int, list[np.ndarray]]) -> Hashable:
        kind = shard.x.shape[1:] if isinstance(shard, ArrayShard) else tuple(plan)
        return (kind, sum(len(batches) for batches in plan.values()).bit_length())

    def cost(self, client: int) -> int:
        """Tokens of all its rows, or rows where there are none."""
        return _tokens(shard_of(self.shards, client))

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """Batches of these clients; the seed is not used, for nothing is drawn."""
        del seed
        own_shards = [shard_of(self.shards, c) for c in clients]
        plans = [self._plan(shard) for shard in own_shards]
        _check_block([self._shape(shard, plan) for shard, plan in zip(own_shards, plans, strict=True)])
        nothing = np.full(self.batch_size, -1, np.int64)
        for width in sorted({w for plan in plans for w in plan}, reverse=True):
            mine = [plan.get(width, []) for plan in plans]
            for step in range(max(len(batches) for batches in mine)):
                active = [step < len(batches) for batches in mine]
                numbers = [batches[step] if on else nothing for batches, on in zip(mine, active, strict=True)]
                slots = [((shard, n),) for shard, n in zip(own_shards, numbers, strict=True)]
                yield assemble(slots, active, width=width, pad=self.pad)
