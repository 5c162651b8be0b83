"""A head for each client in closed form, between everybody's rows and its own: personal in one round, and exact.

The server's sums ``G`` and ``H`` of all clients come down, and client k solves

    (ΣG + mu G_k + lambda I) W_k = ΣH + mu H_k

with its own statistics: as if its rows stood 1 + mu times among everybody's. With mu 0 it is the shared head. Of
several mu each client keeps the one whose head has the least squared error on its validation rows, which is what ridge
regression makes small; of equal ones the first. Nothing of a head leaves. The sums may have been added up under masks.

References:
    Eros Fanì, Raffaello Camoriano, Barbara Caputo and Marco Ciccone. "Accelerating Heterogeneous
    Federated Learning with Closed-form Classifiers." ICML 2024. https://arxiv.org/abs/2406.01116 (the shared head)

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
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import COUNT, Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.server.ridge import head_of

__all__ = ["BestHead", "PersonalHeads"]

_GROUP = "head"


@final
@dataclass(frozen=True, slots=True)
class PersonalHeads:
    """A head for each weight of a client's own rows, as a client work; no tensor leaves.

    The job's shared tensors are ``G`` (d, d) and ``H`` (d, K) of all clients.

    Args:
        statistics: Sums of a client's rows, as those of all were made.
        lam: λ > 0.
        weights: How much more a client's own rows count (mu), a head each.
    """

    statistics: Statistics
    _: KW_ONLY
    lam: float
    weights: tuple[float, ...]

    def expected(self, job: Job) -> Expected:
        """The number of rows."""
        return Expected(group=_GROUP, metrics={"count": COUNT})

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> StatisticsState:
        """Empty sums."""
        return self.statistics.init(job, clients, own_C)

    def step(self, state: StatisticsState, batch: Batch) -> StatisticsState:
        """The sums with one more batch in them; raises as the statistics."""
        return self.statistics.step(state, batch)

    def final(self, state: StatisticsState) -> tuple[Message, Tree | None]:
        """How many rows, and each client's heads to keep."""
        shared = {name: state.job.shared.trainable[name].cpu() for name in ("G", "H")}
        own_C: Tree = {}
        for place, mu in enumerate(self.weights):
            heads = [
                head_of({name: x + mu * state.sums[name][c] for name, x in shared.items()}, self.lam)
                for c in range(len(state.clients))
            ]
            own_C = trees.join(f"heads/{place}/", {n: torch.stack([h[n] for h in heads]) for n in heads[0]}, own_C)
        return _counted(state.job, state.clients, state.sums["n"].sum(1)), own_C


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BestHeadState:
    """A block of clients part way through their rows: their heads, and each head's squared error ``(C, weights)``."""

    job: Job
    clients: tuple[int, ...]
    own_C: Tree
    error_CM: Tensor
    count_C: Tensor


@final
@dataclass(frozen=True, slots=True)
class BestHead:
    """Each client keeps the head that is best on the rows of this work, its validation rows; no tensor leaves.

    Args:
        features: Frozen features ``(C, B, d)`` of a batch.
        classes: K.
        weights: Those of :class:`PersonalHeads`.
    """

    features: Callable[[Batch], Tensor]
    _: KW_ONLY
    classes: int
    weights: tuple[float, ...]

    def expected(self, job: Job) -> Expected:
        """The number of rows."""
        return Expected(group=_GROUP, metrics={"count": COUNT})

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> BestHeadState:
        """The heads, and errors at zero.

        Raises:
            LichenError: if a client has no heads to choose from.
        """
        if not trees.split(own_C or {}, "heads/")[0]:
            raise LichenError("there are no heads to choose from", where="head", fix="let the client solve before")
        zeros_CM = torch.zeros(len(clients), len(self.weights), dtype=torch.float64)
        return BestHeadState(
            job=job, clients=tuple(clients), own_C=dict(own_C or {}), error_CM=zeros_CM, count_C=zeros_CM[:, 0].clone()
        )

    @torch.no_grad()
    def step(self, state: BestHeadState, batch: Batch) -> BestHeadState:
        """The errors with one more batch's labelled rows in them."""
        labels_CB = batch["labels_CB"].cpu()
        counted_CB = (labels_CB >= 0) & batch["active_C"].cpu().unsqueeze(1)
        if "index_CB" in batch:
            counted_CB = counted_CB & (batch["index_CB"].cpu() >= 0)
        x_CBd = self.features(batch).detach().cpu().double()
        error_CM = state.error_CM.clone()
        for c, chosen_B in enumerate(counted_CB):
            truth_NK = functional.one_hot(labels_CB[c][chosen_B], self.classes).double()
            for place in range(len(self.weights)):
                weight_Kd, bias_K = (state.own_C[f"heads/{place}/head.{part}"][c] for part in ("weight", "bias"))
                error_CM[c, place] += (x_CBd[c][chosen_B] @ weight_Kd.T + bias_K - truth_NK).square().sum()
        return replace(state, error_CM=error_CM, count_C=state.count_C + counted_CB.sum(1))

    def final(self, state: BestHeadState) -> tuple[Message, Tree | None]:
        """How many rows, and each client's best head as ``params/`` beside its weight ``mu``."""
        choice_C = state.error_CM.argmin(1)
        clients = range(len(state.clients))
        best_C = {
            f"params/head.{part}": torch.stack([state.own_C[f"heads/{choice_C[c]}/head.{part}"][c] for c in clients])
            for part in ("weight", "bias")
        }
        mu_C = torch.tensor(self.weights, dtype=torch.float64)[choice_C]
        return _counted(state.job, state.clients, state.count_C), {**best_C, "mu": mu_C}


def _counted(job: Job, clients: Sequence[int], count_C: Tensor) -> Message:
    """One message of the numbers of rows."""
    return Message(
        group=_GROUP,
        client_C=torch.tensor(clients, dtype=torch.int64),
        version_C=torch.full((len(clients),), job.version, dtype=torch.int64),
        tensors={},
        weight_C=count_C,
        metrics={"count": count_C},
    )
