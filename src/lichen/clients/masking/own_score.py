"""Makes an evaluation tell, beside its sums, each client's own score: as a number to add up, and as its place in bins.

A mean over clients and their deciles need every client's score, which no sum over rows has. So a client reckons its
score itself, and tells it as two sums: the score, and a one in its bin. Under masks the server learns the mean and the
histogram: how many clients scored what, and not which.

Legend: C clients, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.contracts.client import ClientWork
from lichen.core.contracts.model import Batch
from lichen.core.conventions.bins import Bins
from lichen.core.expected import Expected, MetricSpec
from lichen.core.message import Job, Message
from lichen.core.tree import Tree

__all__ = ["BINS", "SCORE", "SCORED", "OwnScore"]

SCORE, SCORED, BINS = "score", "scored", "bins"
"""Metrics: the sum of the clients' scores, how many have one, and how many in each bin ``(B,)``."""


@final
@dataclass(frozen=True, slots=True)
class OwnScore:
    """An evaluation with the metrics :data:`SCORE`, :data:`SCORED` and, where there are bins, :data:`BINS`.

    Args:
        inner: The evaluation.
        values: From its metrics ``(C, ...)`` to scores ``(C,)``; not-a-number of who has none.
        bins: That scores are counted in, and kept within the ends of; None: they are added up alone.
    """

    inner: ClientWork
    values: Callable[[Mapping[str, Tensor]], Tensor]
    _: KW_ONLY
    bins: Bins | None = None

    def expected(self, job: Job) -> Expected:
        """The evaluation's metrics and these."""
        expected = self.inner.expected(job)
        bins = {} if self.bins is None else {BINS: MetricSpec(shape=(self.bins.count,))}
        return replace(expected, metrics={**expected.metrics, SCORE: MetricSpec(), SCORED: MetricSpec(), **bins})

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> Any:
        """The evaluation's."""
        return self.inner.init(job, clients, own_C)

    def step(self, state: Any, batch: Batch) -> Any:
        """The evaluation's."""
        return self.inner.step(state, batch)

    def final(self, state: Any) -> tuple[Message, Tree | None]:
        """The evaluation's message, with its clients' scores."""
        message, own_C = self.inner.final(state)
        scores = self.values(message.metrics).tolist()
        bounded = scores if self.bins is None else [self.bins.clamped(score) for score in scores]
        known_C = torch.tensor([not math.isnan(score) for score in scores], dtype=torch.bool)
        score_C = torch.tensor([0.0 if math.isnan(score) else score for score in bounded], dtype=torch.float64)
        metrics = {**message.metrics, SCORE: score_C, SCORED: known_C.double()}
        if self.bins is not None:
            bins_CB = torch.zeros(len(scores), self.bins.count, dtype=torch.float64)
            for client, score in enumerate(scores):
                if (place := self.bins.place(score)) >= 0:
                    bins_CB[client, place] = 1.0
            metrics[BINS] = bins_CB
        return replace(message, metrics=metrics), own_C
