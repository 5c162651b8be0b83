"""Weighs a client by the number of its rows, not by those seen in a round.

McMahan et al. weigh client k by n_k, the number of its training rows. A round of fixed steps sees equally many rows
of a client with ten and of one with ten thousand; this work puts n_k in place of what was seen.

References:
    H. Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson and Blaise Agüera y Arcas.
    "Communication-Efficient Learning of Deep Networks from Decentralized Data." AISTATS 2017.
    https://arxiv.org/abs/1602.05629

Legend: C clients, N clients of the roster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from lichen.core.contracts.client import ClientWork
from lichen.core.contracts.model import Batch
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree

__all__ = ["ByRows"]


@final
@dataclass(frozen=True, slots=True)
class ByRows:
    """Any work, its message weighed by the client's rows; a message of weight 0 keeps it.

    Args:
        inner: What is done.
        rows_N: Training rows of every client.
    """

    inner: ClientWork
    rows_N: Sequence[int]

    def expected(self, job: Job) -> Expected:
        """The work's, weighing as many rows as the largest client of the job has, at most."""
        most = max((self.rows_N[client] for client in job.clients), default=0)
        return replace(self.inner.expected(job), weight=(0.0, float(most)))

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> Any:
        """The work's."""
        return self.inner.init(job, clients, own_C)

    def step(self, state: Any, batch: Batch) -> Any:
        """The work's."""
        return self.inner.step(state, batch)

    def final(self, state: Any) -> tuple[Message, Tree | None]:
        """The work's message with n_k as its weight, and the work's private state."""
        message, own_C = self.inner.final(state)
        rows_C = torch.tensor([self.rows_N[c] for c in message.client_C.tolist()]).to(message.weight_C)
        return replace(message, weight_C=torch.where(message.weight_C > 0, rows_C, message.weight_C)), own_C
