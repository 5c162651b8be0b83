"""Trains on the client's rows and then reports token logits, in one job: FedMKT's client.

Research: no recipe and no public name reaches this module.

Two folds in a row are one fold: the client trains on its own rows, and what it has become then tells about the
public texts, in the same message. That saves a trip, and a version of the private state.

References:
    Tao Fan, Guoqiang Ma, Yan Kang, Hanlin Gu, Yuanfeng Song, Lixin Fan, Kai Chen and Qiang Yang. "FedMKT:
    Federated Mutual Knowledge Transfer for Large and Small Language Models." COLING 2025.
    https://arxiv.org/abs/2406.02224

Legend: C clients.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch

from lichen.clients.training.train import Train, TrainState
from lichen.core.contracts.client import Source
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.research.mutual.token_logits import ReportLogits, ReportLogitsState

__all__ = ["TrainThenReport", "TrainThenReportSource"]

_PUBLIC = "public_C"


@final
@dataclass(frozen=True, slots=True)
class TrainThenReportSource:
    """A client's own batches, and then the public ones.

    Args:
        local: For training.
        public: For telling.
    """

    local: Source
    _: KW_ONLY
    public: Source

    def shape(self, client: int) -> Hashable:
        """Both shapes."""
        return self.local.shape(client), self.public.shape(client)

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """Both sources' batches, each with ``public_C``: whether it is a public one."""
        for source, public in ((self.local, False), (self.public, True)):
            for batch in source.batches(clients, seed):
                yield {**batch, _PUBLIC: torch.full((len(clients),), public)}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TrainThenReportState:
    """A block of clients in training or, once ``reporting`` is there, after it."""

    train: TrainState
    reporting: ReportLogitsState | None = None


@final
@dataclass(frozen=True, slots=True)
class TrainThenReport:
    """Training and telling as one client work; serve it with a :class:`TrainThenReportSource`.

    Args:
        inner: Training of the clients' own tensors.
        report: What they tell then.

    Raises:
        LichenError: if either is not personal.
    """

    inner: Train
    _: KW_ONLY
    report: ReportLogits

    def __post_init__(self) -> None:
        if not (self.inner.personal and self.report.personal):
            raise LichenError(
                "a client tells what its own tensors say",
                where="visit",
                fix="set personal for both training and telling",
            )

    def expected(self, job: Job) -> Expected:
        """The telling's, with the training's metrics and the texts' loss."""
        reported, trained = self.report.expected(job), self.inner.expected(job)
        public = replace(reported.metrics["loss_sum"], per="", high=math.inf)
        return replace(reported, metrics={**trained.metrics, "public_loss": public})

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> TrainThenReportState:
        """Clients about to train; raises as :meth:`Train.init`."""
        return TrainThenReportState(train=self.inner.init(job, clients, own_C))

    def step(self, state: TrainThenReportState, batch: Batch) -> TrainThenReportState:
        """A step of training, or one more public batch told of."""
        own = {name: x for name, x in batch.items() if name != _PUBLIC}
        if not bool(batch[_PUBLIC].any()):
            return replace(state, train=self.inner.step(state.train, own))
        reporting = self._trained(state) if state.reporting is None else state.reporting
        return replace(state, reporting=self.report.step(reporting, own))

    def _trained(self, state: TrainThenReportState) -> ReportLogitsState:
        _, own_C = self.inner.final(state.train)
        return self.report.init(state.train.job, state.train.clients, own_C)

    def final(self, state: TrainThenReportState) -> tuple[Message, Tree | None]:
        """The telling's message with the training's metrics, and ``public_loss``, the texts' losses summed."""
        trained, _ = self.inner.final(state.train)
        message, own_C = self.report.final(self._trained(state) if state.reporting is None else state.reporting)
        metrics = {**trained.metrics, "public_loss": message.metrics["loss_sum"]}
        return replace(message, metrics=metrics), own_C
