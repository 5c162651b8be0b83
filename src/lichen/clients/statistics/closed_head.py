"""A head in closed form at its clients: solved from a client's own rows alone, and scored on rows of its own.

What a client solves stays with it as private state: the server learns how many rows were in it, and how it scored.

Legend: C clients, B rows, d features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from lichen.clients.statistics.sufficient import Statistics, StatisticsState
from lichen.core import tree as trees
from lichen.core.collecting.admission import rows_of
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import COUNT, Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree

__all__ = ["HeadConfusion", "OwnHead", "predict"]

_HEAD = "params/"
"""How names of a client's own head begin."""


@final
@dataclass(frozen=True, slots=True)
class OwnHead:
    """Every client's head of its own rows as a client work; no tensor leaves.

    Args:
        statistics: Sums of a client's rows.
        solve: From the statistics of one client to its head, ``head.weight`` ``(K, d)`` and ``head.bias`` ``(K,)``.
    """

    statistics: Statistics
    solve: Callable[[Message], Tree]

    def expected(self, job: Job) -> Expected:
        """The number of rows."""
        return replace(self.statistics.expected(job), tensors={})

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> StatisticsState:
        """Empty sums."""
        return self.statistics.init(job, clients, own_C)

    def step(self, state: StatisticsState, batch: Batch) -> StatisticsState:
        """The sums with one more batch in them."""
        return self.statistics.step(state, batch)

    def final(self, state: StatisticsState) -> tuple[Message, Tree | None]:
        """How many rows, and each client's head to keep.

        Raises:
            LichenError: if a client has no labelled row.
        """
        message, _ = self.statistics.final(state)
        heads = [self.solve(rows_of(message, [place])) for place in range(len(state.clients))]
        own_C = {f"{_HEAD}{name}": torch.stack([head[name] for head in heads]) for name in heads[0]}
        return replace(message, tensors={}), own_C


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ConfusionState:
    """A block of clients part way through their rows."""

    job: Job
    clients: tuple[int, ...]
    head_C: Tree
    confusion_CKK: Tensor


@final
@dataclass(frozen=True, slots=True)
class HeadConfusion:
    """Counts of (true, predicted) classes as a client work: metrics ``confusion`` ``(K, K)`` and ``count``.

    Args:
        features: Frozen features ``(C, B, d)`` of a batch.
        classes: K.
        personal: Score each client's own head, from :class:`OwnHead`; else the shared one of the job.
    """

    features: Callable[[Batch], Tensor]
    _: KW_ONLY
    classes: int
    personal: bool = False

    def expected(self, job: Job) -> Expected:
        """Counts, and no tensor."""
        confusion = replace(COUNT, high=1.0, per="count", shape=(self.classes, self.classes))
        return Expected(group="head", metrics={"confusion": confusion, "count": COUNT})

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> ConfusionState:
        """The heads, and counts at zero.

        Raises:
            LichenError: if a client that is to be scored with its own head has none.
        """
        head_C = (
            trees.split(own_C or {}, _HEAD)[0] if self.personal else trees.expand(job.shared.trainable, len(clients))
        )
        if not head_C:
            raise LichenError("there is no head to score", where="head", fix="let the client solve for one before")
        zeros_CKK = torch.zeros(len(clients), self.classes, self.classes, dtype=torch.float64)
        return ConfusionState(job=job, clients=tuple(clients), head_C=head_C, confusion_CKK=zeros_CKK)

    @torch.no_grad()
    def step(self, state: ConfusionState, batch: Batch) -> ConfusionState:
        """The counts with one more batch's labelled rows in them."""
        labels_CB = batch["labels_CB"].cpu()
        counted_CB = (labels_CB >= 0) & batch["active_C"].cpu().unsqueeze(1)
        if "index_CB" in batch:
            counted_CB = counted_CB & (batch["index_CB"].cpu() >= 0)
        x_CBd = self.features(batch).detach().cpu()
        found = [predict({n: w[c] for n, w in state.head_C.items()}, x_Bd) for c, x_Bd in enumerate(x_CBd)]
        true_CBK, found_CBK = (
            functional.one_hot(some_CB, self.classes).double() * counted_CB.unsqueeze(-1)
            for some_CB in (labels_CB.clamp(min=0), torch.stack(found))
        )
        more_CKK = torch.einsum("cbi,cbj->cij", true_CBK, found_CBK)
        return replace(state, confusion_CKK=state.confusion_CKK + more_CKK)

    def final(self, state: ConfusionState) -> tuple[Message, Tree | None]:
        """One message of counts, weighed by the rows in them."""
        count_C = state.confusion_CKK.sum((1, 2))
        message = Message(
            group="head",
            client_C=torch.tensor(state.clients, dtype=torch.int64),
            version_C=torch.full((len(state.clients),), state.job.version, dtype=torch.int64),
            tensors={},
            weight_C=count_C,
            metrics={"confusion": state.confusion_CKK, "count": count_C},
        )
        return message, None


def predict(head: Tree, x_Nd: Tensor) -> Tensor:
    """The class of every row, ``(N,)``."""
    scores_NK = x_Nd.double() @ head["head.weight"].double().T + head["head.bias"].double()
    return scores_NK.argmax(1)
