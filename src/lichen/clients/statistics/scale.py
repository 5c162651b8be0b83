"""Losses of a classifier's head multiplied by each of several factors: what a server needs to choose one.

A head in closed form says which class is likelier, not by how much. One factor on all its logits makes them mean
probabilities; it is chosen on rows that the head was not solved from, and those lie with the clients. Each of them
sends the sum of its rows' cross entropy for every factor, and :func:`best_scale` takes the one with the least sum.

References:
    Chuan Guo, Geoff Pleiss, Yu Sun and Kilian Q. Weinberger. "On Calibration of Modern Neural Networks."
    ICML 2017. https://arxiv.org/abs/1706.04599 (one factor on all logits)

Legend: C clients, N clients of a job, B rows, K classes, S factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.expected import COUNT, LOSS, Expected, within
from lichen.core.message import Job, Message
from lichen.core.tree import Tree

__all__ = ["SCALES", "ScaleLosses", "best_scale"]

SCALES = tuple(2 ** (step / 8) for step in range(-48, 49))
"""From 1/64 to 64 in eighths of an octave: the best of all factors is at most 4.5 % from one of them."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleState:
    """A block of clients part way through their rows."""

    job: Job
    clients: tuple[int, ...]
    loss_CS: Tensor
    count_C: Tensor


@final
@dataclass(frozen=True, slots=True)
class ScaleLosses:
    """The losses as a client work: metrics ``losses`` ``(S,)`` and ``count``; no tensor leaves.

    Args:
        model: A classifier; the job's shared tensors hold its head.
        scales: The factors.
    """

    model: CohortModel
    scales: Sequence[float] = SCALES

    def expected(self, job: Job) -> Expected:
        """A sum of losses a factor, and the number of rows."""
        losses = replace(LOSS, shape=(len(self.scales),))
        return Expected(group=self.model.group, metrics={"losses": losses, "count": COUNT})

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> ScaleState:
        """Sums at zero."""
        zeros_CS = torch.zeros(len(clients), len(self.scales), dtype=torch.float64)
        return ScaleState(job=job, clients=tuple(clients), loss_CS=zeros_CS, count_C=zeros_CS[:, 0].clone())

    @torch.no_grad()
    def step(self, state: ScaleState, batch: Batch) -> ScaleState:
        """The sums with one more batch's labelled rows in them."""
        shared = state.job.shared
        logits_CBK = self.model.logits(trees.expand(shared.trainable, len(state.clients)), shared.fixed, batch)
        logits_CBK = logits_CBK.double().cpu()
        labels_CB = batch["labels_CB"].cpu()
        known_CB = (labels_CB >= 0) & batch["active_C"].cpu().unsqueeze(1)
        if "index_CB" in batch:
            known_CB = known_CB & (batch["index_CB"].cpu() >= 0)
        right_CB1 = labels_CB.clamp(min=0).unsqueeze(-1)
        losses = [
            -(logits_CBK * scale).log_softmax(-1).gather(-1, right_CB1).squeeze(-1).masked_fill(~known_CB, 0.0).sum(1)
            for scale in self.scales
        ]
        return replace(
            state, loss_CS=state.loss_CS + torch.stack(losses, 1), count_C=state.count_C + known_CB.sum(1).double()
        )

    def final(self, state: ScaleState) -> tuple[Message, Tree | None]:
        """One message of sums, weighed by the rows in them."""
        message = Message(
            group=self.model.group,
            client_C=torch.tensor(state.clients, dtype=torch.int64),
            version_C=torch.full((len(state.clients),), state.job.version, dtype=torch.int64),
            tensors={},
            weight_C=state.count_C,
            metrics=within({"losses": state.loss_CS, "count": state.count_C}, self.expected(state.job).metrics),
        )
        return message, None


def best_scale(losses_NS: Tensor, scales: Sequence[float] = SCALES) -> float:
    """The factor with the least sum of losses over all clients; sums are exact, so their order does not matter.

    Args:
        losses_NS: What :class:`ScaleLosses` has sent, ``(N, S)``.
        scales: The factors they belong to.

    Raises:
        LichenError: if there is no loss in them: nobody has a labelled row.

    >>> best_scale(torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.5, 4.0]]), (0.5, 1.0, 2.0))
    1.0
    """
    sums = [math.fsum(column) for column in losses_NS.double().T.tolist()]
    if not any(sums):
        raise LichenError(
            "no labelled row to scale the head by", where="data.valid", fix="keep rows for validation, with labels"
        )
    return scales[sums.index(min(sums))]
