"""The engine of several ranks: each trains a share of the clients, and sums are all-reduced.

All ranks run one program over one recipe. Which client is whose follows from the data alone, so nobody
has to ask; a rank folds its own messages, and since an aggregator is a monoid of exact sums, merging the
ranks' totals gives the bytes of one rank. What is trained where makes no difference to a result.

References:
    Ronald L. Graham. "Bounds on Multiprocessing Timing Anomalies." SIAM Journal on Applied
    Mathematics 17(2), 1969 (longest first: at most 4/3 - 1/(3 ranks) of the best possible time).

Legend: N clients of a job.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.contracts.client import Costed
from lichen.core.contracts.server import Aggregator
from lichen.core.errors import LichenError
from lichen.core.fold import blocks
from lichen.core.message import Job
from lichen.core.replies import Reply
from lichen.core.tree import Tree
from lichen.engines.local import LocalEngine, sorted_by_client
from lichen.engines.ranks import Ranks

__all__ = ["DistributedEngine", "balanced_ranks"]

PIECES = 16
"""Parts for each rank that a job is cut into: the more, the more evenly they can be dealt out."""


def balanced_ranks(costs: Sequence[int], ranks: int) -> list[int]:
    """The rank of every piece: the dearest piece first, each to the rank that has least to do so far.

    >>> balanced_ranks([5, 4, 3, 3, 3], 2)
    [0, 1, 1, 0, 1]
    """
    free = [(0, rank) for rank in range(ranks)]
    out = [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, out[piece] = free[0]
        heapq.heapreplace(free, (load + costs[piece], out[piece]))
    return out


@final
class DistributedEngine:
    """This rank's part of an engine over all of them.

    Args:
        local: Does this rank's share; its clients' private state lies where all ranks see it.
        ranks: All of them.
    """

    def __init__(self, local: LocalEngine, ranks: Ranks) -> None:
        self.local, self.ranks = local, ranks
        self.bytes_up = 0
        self.bytes_down = 0
        self._counted = (0, 0)

    def share(self, job: Job) -> tuple[int, ...]:
        """The job's clients that are this rank's to train, in the job's order; the ranks' shares part them."""
        if job.work not in self.local.client_tasks:
            return job.clients  # every rank is to say so
        source = self.local.client_tasks[job.work].source
        pieces = blocks(job.clients, source, max(1, len(job.clients) // (PIECES * self.ranks.size)))
        # Clients of unknown cost count alike.
        costs = [sum(source.cost(c) if isinstance(source, Costed) else 1 for c in piece) for piece in pieces]
        dealt = balanced_ranks(costs, self.ranks.size)
        mine = {c for piece, rank in zip(pieces, dealt, strict=True) if rank == self.ranks.rank for c in piece}
        return tuple(c for c in job.clients if c in mine)

    def submit(self, job: Job) -> int:
        """Take this rank's share of a job."""
        return self.local.submit(replace(job, clients=self.share(job)))

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """This rank's replies; ``bytes_up`` and ``bytes_down`` are everybody's after ``merge`` or ``join``."""
        yield from self.local.replies(numbers, until)

    def answer(self, number: int, clients: Sequence[int], answer_C: Tree | None) -> None:
        """Answer this rank's clients."""
        self.local.answer(number, clients, answer_C)

    def cancel(self, number: int) -> None:
        """Give a job up on this rank."""
        self.local.cancel(number)

    def now(self) -> float:
        """Seconds of this rank's steady clock."""
        return self.local.now()

    def merge(self, aggregator: Aggregator, total: Any) -> Any:
        """The total of all ranks, of equal bytes on each.

        Raises:
            LichenError: what ended another rank.
        """
        merged: Any = None
        for rank in range(self.ranks.size):
            # One at a time, so that no rank ever holds more than two totals.
            mine = self._bring(*aggregator.dump(total)) if rank == self.ranks.rank else b""
            tensors, header = self._take(self.ranks.share(mine, source=rank, about=f"total {rank}"))
            part = aggregator.load(tensors, header)
            merged = part if rank == 0 else aggregator.merge(merged, part)
        return merged

    def join(
        self, client_N: Tensor, metrics: Tree, lines: Sequence[Sequence[str]] = ()
    ) -> tuple[Tensor, Tree, tuple[tuple[str, ...], ...]]:
        """``(client_N, metrics, lines)`` of all ranks, sorted by client; a rank without clients brings nothing.

        Raises:
            LichenError: what ended another rank, or metrics that do not match.
        """
        mine = self._bring({"client": client_N, **trees.join("m.", metrics, {})}, {"lines": [list(x) for x in lines]})
        received = [self._take(data) for data in self.ranks.exchange(mine, about="join")]
        every = tuple(tuple(str(word) for word in line) for _, header in received for line in header["lines"])
        parts = [tensors for tensors, _ in received if len(tensors["client"])]
        if not parts:
            return client_N, metrics, every
        whole = trees.concatenate(parts)
        return *sorted_by_client(whole.pop("client"), trees.split(whole, "m.")[0]), every

    def _bring(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
        """The bytes of a tree and a header; the bytes counted since the last time ride along."""
        counted = (self.local.bytes_up, self.local.bytes_down)
        news = [now - before for now, before in zip(counted, self._counted, strict=True)]
        self._counted = counted
        return save(trees.plain(tensors), metadata={"lichen": json.dumps({"bytes": news, "header": header})})

    def _take(self, data: bytes) -> tuple[Tree, dict[str, Any]]:
        try:
            length = int.from_bytes(data[:8], "little")
            received = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["lichen"])
            up, down = received["bytes"]
            tensors, header = load(data), dict(received["header"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise LichenError(
                f"{len(data)} bytes of another rank cannot be read: {error}",
                where="engine",
                fix="start all ranks with one version of lichen",
            ) from None
        self.bytes_up += up
        self.bytes_down += down
        return tensors, header
