"""Poisson batches: every row is in a step's batch with the same chance, by a coin of its own.

This is the sampling that privacy accountants amplify by. The number of rows is itself random, and a batch may be
empty: that is a step like any other, in which noise alone is added. A client's step comes in micro-batches of a
fixed number of rows, as many as it takes; ``ends_step_C`` tells whose step is over. So no batch is cut to a
largest size, which would break the sampling, and clients side by side need not end their steps together.

References:
    Martín Abadi, Andy Chu, Ian Goodfellow, H. Brendan McMahan, Ilya Mironov, Kunal Talwar and Li Zhang.
    "Deep Learning with Differential Privacy." CCS 2016. https://arxiv.org/abs/1607.00133 (lots by sampling).
    Yuqing Zhu and Yu-Xiang Wang. "Poisson Subsampled Rényi Differential Privacy." ICML 2019.
    http://proceedings.mlr.press/v97/zhu19c.html

Legend: C clients, B rows of a micro-batch, N clients of the roster.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import final

import numpy as np
import torch

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.secret.randomness import SecretRandomness
from lichen.data.batches.collate import assemble
from lichen.data.batches.rows import TextShard
from lichen.data.batches.shards import TrainSource, shard_of

__all__ = ["PoissonRows"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class PoissonRows:
    """A training source whose steps are Poisson samples of the client's rows.

    What client c sees depends on its rows, its number, its rate, the seed and the secret, never on its company.

    Attributes:
        local: The clients' rows, their width and their number of steps; its batch size is not used.
        rate_N: Chance of a row to be in a step, of every client; in (0, 1].
        randomness: Draws the coins.
        batch_rows: Rows of a micro-batch.

    Raises:
        LichenError: if a micro-batch has no row, or steps are counted in passes over the rows.
    """

    local: TrainSource
    _: KW_ONLY
    rate_N: Sequence[float]
    randomness: SecretRandomness
    batch_rows: int = 8

    def __post_init__(self) -> None:
        if self.batch_rows < 1:
            raise LichenError(f"batch_rows is {self.batch_rows}", where="PoissonRows", fix="use a number above 0")
        if self.local.epochs is not None:
            raise LichenError("a sample has no passes over rows", where="PoissonRows", fix="count steps")

    def shape(self, client: int) -> Hashable:
        """The local source's."""
        return self.local.shape(client)

    def cost(self, client: int) -> int:
        """Tokens of its steps as they are on average, or rows where there are none."""
        shard = shard_of(self.local.shards, client)
        units = int(shard.length_N.sum()) if isinstance(shard, TextShard) else shard.size
        return round(self.local.steps_of(client, shard) * self.rate(client) * units)

    def rate(self, client: int) -> float:
        """The chance of each of its rows.

        Raises:
            LichenError: if it is no chance.
        """
        rate = float(self.rate_N[client])
        if not 0 < rate <= 1:
            raise LichenError(f"client {client}'s sampling rate is {rate}", where="PoissonRows", fix="use 0 < q <= 1")
        return rate

    def pieces(self, client: int, seed: int) -> Iterator[tuple[np.ndarray, bool]]:
        """``(row numbers (batch_rows,), whether the step ends)``, -1 for padding rows, of all steps of a client."""
        shard = shard_of(self.local.shards, client)
        coins = self.randomness.stream("rows", seed, client)
        for _ in range(self.local.steps_of(client, shard)):
            sample = coins.bernoulli(self.rate(client), shard.size).nonzero()[:, 0].numpy()
            count = max(1, -(-len(sample) // self.batch_rows))
            padded = np.full(count * self.batch_rows, -1, np.int64)
            padded[: len(sample)] = sample
            for k, numbers in enumerate(padded.reshape(count, self.batch_rows)):
                yield numbers, k + 1 == count

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """As many micro-batches as the busiest of these clients has; others go inactive after theirs."""
        shards = [shard_of(self.local.shards, c) for c in clients]
        if len({self.local.shape_of(shard) for shard in shards}) > 1:
            raise LichenError(
                "clients of different shapes cannot stand side by side", where="block", fix="group them by shape()"
            )
        waiting = [self.pieces(c, seed) for c in clients]
        nothing = np.full(self.batch_rows, -1, np.int64)
        while True:
            found = [next(piece, None) for piece in waiting]
            active = [piece is not None for piece in found]
            if not any(active):
                return
            slots = [((s, nothing if p is None else p[0]),) for s, p in zip(shards, found, strict=True)]
            batch = assemble(slots, active, width=self.local.width_of(shards[0]), pad=self.local.pad)
            ends_C = torch.tensor([piece is not None and piece[1] for piece in found])
            yield {**batch, "ends_step_C": ends_C}
