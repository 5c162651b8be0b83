"""A client watches its own losses, row by row, and says no more than whether it saw them rise.

The losses and the detector's state stay at the client, as private state. The server adds up who was alarmed and who
watched, so that masks can lie over it.

Rows are gone through in the order in which the client has them, whatever the order of batches; the detector goes on
where the job before has left it, so that a drift may be seen in the period after the one in which it began. Clients
see it in different periods, and each begins anew after its alarm: a job may ask for alarms of the last few periods.

References:
    João Gama, Pedro Medas, Gladys Castillo and Pedro Rodrigues. "Learning with Drift Detection." SBIA 2004, LNCS 3171.
    https://doi.org/10.1007/978-3-540-28645-5_29 (errors are watched)

Legend: C clients, B rows of a batch, S numbers of a detector's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.clients.drift.embedding_sums import counted
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.expected import Expected, MetricSpec
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.server.drift.detector import Detector, watch

__all__ = ["ALARMED", "RECENT", "WATCHED", "LossWatch", "enough"]

ALARMED, WATCHED = "alarmed", "watched"
"""Metrics, 0 or 1 of each client: whether there was an alarm, and whether there was a row to watch."""

RECENT = "recent"
"""The job's setting: of how many periods, its own the last of them, an alarm counts; 1 where it is not set."""

_STATE, _LAST = "drift/detector", "drift/last_alarm"
"""Private state's names, float64: ``(S,)``; and the version of the last job with an alarm, -1 of none."""

_GROUP = "drift/losses"


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossWatchState:
    """A block of clients part way through their rows.

    Attributes:
        job: What was asked.
        clients: Whose rows.
        params_C: What losses are taken at.
        own_C: Private state as it was.
        losses: Of each client, ``(row's number, loss)`` so far.
    """

    job: Job
    clients: tuple[int, ...]
    params_C: Tree
    own_C: Tree
    losses: tuple[tuple[tuple[int, float], ...], ...]


@final
@dataclass(frozen=True, slots=True)
class LossWatch:
    """The watch as a client work: metrics ``alarmed`` and ``watched``; no tensor and no loss leaves.

    Args:
        model: Gives losses of rows, at the job's shared tensors.
        detector: Sees them, those of each client by itself; take one that standardises.
    """

    model: CohortModel
    detector: Detector

    def expected(self, job: Job) -> Expected:
        """Two metrics of 0 or 1."""
        bit = MetricSpec(0.0, 1.0)
        return Expected(group=_GROUP, metrics={ALARMED: bit, WATCHED: bit}, weight=(0.0, 1.0))

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> LossWatchState:
        """No rows."""
        return LossWatchState(
            job=job,
            clients=tuple(clients),
            params_C=trees.expand(job.shared.trainable, len(clients)),
            own_C=dict(own_C or {}),
            losses=((),) * len(clients),
        )

    @torch.no_grad()
    def step(self, state: LossWatchState, batch: Batch) -> LossWatchState:
        """The state with the losses of one more batch's rows.

        Raises:
            LichenError: if the loss is no sum over rows.
        """
        loss_CB, count_CB = self.model.losses(state.params_C, state.job.shared.fixed, batch)
        count_CB = count_CB.detach().cpu().double()
        mean_CB = loss_CB.detach().cpu().double() / count_CB.clamp(min=1)
        seen_CB = counted(batch) & (count_CB > 0)
        losses = []
        for before, index_B, mean_B, seen_B in zip(
            state.losses, batch["index_CB"].cpu(), mean_CB, seen_CB, strict=True
        ):
            more = zip(index_B[seen_B].tolist(), mean_B[seen_B].tolist(), strict=True)
            losses.append((*before, *more))
        return replace(state, losses=tuple(losses))

    def final(self, state: LossWatchState) -> tuple[Message, Tree | None]:
        """One message of alarms, and each client's detector to keep."""
        before_C = state.own_C.get(_STATE)
        version, recent = state.job.version, float(state.job.settings.get(RECENT, 1.0))
        last_C = state.own_C.get(_LAST, torch.full((len(state.clients),), -1.0, dtype=torch.float64)).cpu().clone()
        detectors = list[Tensor]()
        for c, losses in enumerate(state.losses):
            before = None if before_C is None else self.detector.load(before_C[c].cpu())
            after, alarms = watch(self.detector, [loss for _, loss in sorted(losses)], before)
            last_C[c] = version if alarms else last_C[c]
            detectors.append(self.detector.dump(after))
        alarmed_C = ((last_C >= 0) & (last_C > version - recent)).double()
        watched_C = torch.tensor([float(bool(losses)) for losses in state.losses], dtype=torch.float64)
        message = Message(
            group=_GROUP,
            client_C=torch.tensor(state.clients, dtype=torch.int64),
            version_C=torch.full((len(state.clients),), state.job.version, dtype=torch.int64),
            tensors={},
            weight_C=watched_C,
            metrics={ALARMED: alarmed_C, WATCHED: watched_C},
        )
        return message, {**state.own_C, _STATE: torch.stack(detectors), _LAST: last_C}


def enough(alarmed: float, watched: float, share: float) -> bool:
    """Whether so many alarms are one of the federation: at least this share of those who watched, and one.

    >>> enough(1, 10, 0.2), enough(2, 10, 0.2), enough(0, 0, 0.2)
    (False, True, False)
    """
    return alarmed >= 1 and alarmed >= share * watched
