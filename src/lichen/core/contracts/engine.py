"""What carries jobs to clients and their replies back.

Legend: C clients of a job, N clients of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from lichen.core.contracts.server import Aggregator
from lichen.core.message import Job
from lichen.core.replies import Reply
from lichen.core.tree import Tree

__all__ = ["Engine"]


class Engine(Protocol):
    """Transport and time: carries jobs out and replies back, in this process, in others, or over a network.

    :func:`lichen.core.collecting.collect.collect` is what algorithms use it by.

    Where several ranks run one program, each calls the same methods in the same order; ``replies`` yields
    a rank its own clients' replies, and ``merge`` and ``join`` make the ranks' parts one. Bytes are
    counted between clients and server, and are everybody's after either of the two.
    """

    @property
    def bytes_up(self) -> int:
        """Bytes from clients to server so far."""
        ...

    @property
    def bytes_down(self) -> int:
        """Bytes from server to clients so far."""
        ...

    def submit(self, job: Job) -> int:
        """Send a job out; the number by which its replies are known."""
        ...

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """Replies to these jobs, as they arrive, C ≥ 1 clients each; counts what would cross.

        Ends when every client of these jobs has replied or waits for an answer, or at ``until`` on this engine's
        clock. Whoever stops listening before may call again, and hears the rest; replies to other jobs wait.
        """
        ...

    def answer(self, number: int, clients: Sequence[int], answer_C: Tree | None) -> None:
        """Answer what these clients of a job have asked, and go on with them; whoever does not wait gets nothing.

        Args:
            number: The job's.
            clients: Some of those whose question was yielded.
            answer_C: Stacked in their order. None: they are dismissed, and no reply of theirs is yielded any more,
                whether they have asked or not.
        """
        ...

    def cancel(self, number: int) -> None:
        """Give a job up: no reply to it is yielded any more. Nothing happens where all have come."""
        ...

    def now(self) -> float:
        """Seconds on this engine's clock, from any beginning."""
        ...

    def merge(self, aggregator: Aggregator, total: Any) -> Any:
        """The total of all ranks; ``total`` itself where there is one."""
        ...

    def join(
        self, client_N: Tensor, metrics: Tree, lines: Sequence[Sequence[str]] = ()
    ) -> tuple[Tensor, Tree, tuple[tuple[str, ...], ...]]:
        """``(client_N, metrics, lines)`` of all ranks: sorted by client, metrics ``(N, ...)``; lines in the ranks'
        order."""
        ...
