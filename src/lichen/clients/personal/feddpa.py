"""FedDPA: beside the shared low-rank adapter every client has one of its own, and each row weighs the two.

A client's model adds ``(1 - a) s B A x`` of the shared adapter and ``a s B' A' x`` of its own. The shared one is
trained and averaged as ever. The own one is trained with the shared one frozen beside it and ``a`` one half: after the
last round (FedDPA-F), or in every round on the same batches (FedDPA-T). To answer, ``a`` follows from the row:

    a(x) = cap * mean over s of cos(h(x), h(x_s))

where ``x_s`` are some of the client's own training rows and ``h`` is what the frozen model makes of a row
(:meth:`lichen.models.cohort.Cohort.row_states`), so that a row unlike the client's own is left to the shared adapter.
Of the own rows the client keeps the sum of their unit vectors, which is all that the mean needs. With ``cap`` 0 the
model is the shared one.

Here the own adapter begins where the shared one is, so that a client's first model is the shared one; in the paper it
begins at nothing, with half of the shared adapter left. What is no adapter, such as a head, stays the shared model's.

References:
    Yiyuan Yang, Guodong Long, Tao Shen, Jing Jiang and Michael Blumenstein. "Dual-Personalizing Adapter
    for Federated Foundation Models." NeurIPS 2024. https://arxiv.org/abs/2403.19211

Legend: C clients, B rows, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from lichen.clients.personal.pair import OTHER, Paired, factors_C, is_factor, pair_of
from lichen.clients.personal.training import MINE, own_training
from lichen.clients.training.train import Train, TrainState
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.parameters import CENTER
from lichen.core.tree import Tree

__all__ = ["FedDpa", "FedDpaAfterwards", "center_C"]

_SUM, _SEEN = "anchors", "anchors_seen"
_TRAINED = 0.5
"""How much the own adapter counts while it is trained."""


def center_C(mine_C: Tree, cap: float) -> Tensor:
    """``(C, H)``, whose product with a row's unit vector is how much the own adapter counts in it.

    Args:
        mine_C: What the clients have kept.
        cap: The most that it counts.
    """
    seen_C = mine_C[_SEEN].clamp(min=1).to(mine_C[_SUM])
    return cap * mine_C[_SUM] / seen_C[:, None]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FedDpaState:
    """The own adapter in training; the sum of unit vectors of own rows ``(C, H)``, and their number."""

    work: Train
    own: TrainState
    sum_CH: Tensor
    seen_C: Tensor


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FedDpa:
    """FedDPA as a :class:`lichen.clients.personal.training.PersonalMethod`.

    Args:
        cap: The most that the own adapter counts in a row.
        anchors: Own rows that rows are compared with; 0: none are, and the own adapter counts as ``cap`` in all.
        states: From a batch to unit vectors ``(C, B, H)`` of its rows, by the frozen model.
        width: H; 0 without anchors.
    """

    cap: float
    anchors: int
    states: Callable[[Batch], Tensor]
    width: int

    def init(
        self, train: Train, job: Job, clients: Sequence[int], mine_C: Tree, shared: Any
    ) -> tuple[FedDpaState, Any]:
        """The own adapter where it was left, at first the shared one; raises as the training."""
        frozen = tuple(name for name in job.shared.trainable if not is_factor(name))
        model = Paired(train.model, _TRAINED)
        work = replace(own_training(train), model=model, freeze_schedule=(frozen,) if frozen else ())
        rest = dict(mine_C)
        sum_CH, seen_C = rest.pop(_SUM, None), rest.pop(_SEEN, None)
        own = work.init(job, clients, rest or None)
        first_C = factors_C(job.shared.trainable, len(clients))
        own = replace(own, frozen_C=trees.join(OTHER, first_C, own.frozen_C))
        if sum_CH is None or seen_C is None:
            device = next(iter(own.params_C.values())).device
            sum_CH = torch.zeros(len(clients), self.width, device=device)
            seen_C = torch.zeros(len(clients), dtype=torch.int64, device=device)
        return FedDpaState(work=work, own=own, sum_CH=sum_CH, seen_C=seen_C), shared

    def step(self, train: Train, own: FedDpaState, shared: Any, batch: Batch) -> tuple[FedDpaState, Any]:
        """One step of the own adapter; of a client's first rows, what the frozen model makes of them."""
        own = self._with_anchors(own, batch)
        return replace(own, own=own.work.step(own.own, batch)), shared

    def _with_anchors(self, own: FedDpaState, batch: Batch) -> FedDpaState:
        real_CB = (batch["index_CB"] >= 0) & batch["active_C"][:, None]
        real_CB = real_CB.to(own.seen_C.device)
        chosen_CB = real_CB & (real_CB.cumsum(1) + own.seen_C[:, None] <= self.anchors)
        if not bool(chosen_CB.any()):
            return own
        states_CBH = self.states(batch)
        more_CH = (states_CBH * chosen_CB.to(states_CBH)[..., None]).sum(1)
        return replace(own, sum_CH=own.sum_CH + more_CH, seen_C=own.seen_C + chosen_CB.sum(1))

    def final(self, own: FedDpaState, shared: Any, finite_C: Tensor) -> Tree:
        """The own adapter, its optimizer, and the sum over own rows."""
        return {**(own.work.final(own.own)[1] or {}), _SUM: own.sum_CH, _SEEN: own.seen_C}

    def model(self, shared: Tree, mine_C: Tree) -> Tree:
        """The own adapter."""
        return trees.split(mine_C, "params/")[0]

    def form(self, shared: Tree, params_C: Tree, own_C: Tree) -> Tree:
        """The pair, and the centre of own rows; of clients that have no own adapter yet, the shared model."""
        mine_C, _ = trees.split(own_C, MINE)
        if _SEEN not in mine_C:
            return params_C
        clients = len(mine_C[_SEEN])
        first_C = factors_C(shared, clients)
        if not self.anchors:
            return pair_of(first_C, params_C, second=self.cap)
        return {**pair_of(first_C, params_C), CENTER: center_C(mine_C, self.cap)}


@final
@dataclass(frozen=True, slots=True)
class FedDpaAfterwards:
    """The own adapter's training after the rounds, as a client work; the private state is as of training alone.

    Args:
        train: The shared training, whose steps these are.
        method: Trains it.
    """

    train: Train
    method: FedDpa

    def expected(self, job: Job) -> Expected:
        """Those of training alone: no tensor leaves."""
        return own_training(self.train).expected(job)

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> FedDpaState:
        """As :meth:`FedDpa.init`."""
        mine_C, rest = trees.split(own_C or {}, MINE)
        return self.method.init(self.train, job, clients, {**mine_C, **rest}, None)[0]

    def step(self, state: FedDpaState, batch: Batch) -> FedDpaState:
        """As :meth:`FedDpa.step`."""
        return self.method.step(self.train, state, None, batch)[0]

    def final(self, state: FedDpaState) -> tuple[Message, Tree | None]:
        """A message without tensors, and what is kept."""
        message, rest = state.work.final(state.own)
        return message, trees.join(MINE, {_SUM: state.sum_CH, _SEEN: state.seen_C}, rest or {})
