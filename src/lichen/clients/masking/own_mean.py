"""Makes each client's sums of an evaluation its own mean, so that the sum over clients gives the mean over clients.

A mean over clients counts each of them 1, whatever rows it has. Where the server learns sums alone, each client divides
by itself: its loss becomes its mean loss, and its count 1, or 0 where it has no row with a label.

Legend: C clients.
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

__all__ = ["OwnMean"]


@final
@dataclass(frozen=True, slots=True)
class OwnMean:
    """An evaluation whose ``loss_sum`` is each client's mean loss, and whose ``count`` is 1.

    Args:
        inner: The evaluation.
    """

    inner: ClientWork

    def expected(self, job: Job) -> Expected:
        """The same metrics."""
        return self.inner.expected(job)

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> Any:
        """The evaluation's."""
        return self.inner.init(job, clients, own_C)

    def step(self, state: Any, batch: Batch) -> Any:
        """The evaluation's."""
        return self.inner.step(state, batch)

    def final(self, state: Any) -> tuple[Message, Tree | None]:
        """The evaluation's message, divided."""
        message, own_C = self.inner.final(state)
        loss_C, count_C = message.metrics["loss_sum"], message.metrics["count"]
        mean_C = torch.where(count_C > 0, loss_C / count_C.clamp(min=1e-300), torch.zeros_like(loss_C))
        metrics = {**message.metrics, "loss_sum": mean_C, "count": (count_C > 0).double()}
        return replace(message, metrics=metrics), own_C
