"""Votes for one class of each public text, PATE's client; no probability leaves.

Research: no recipe and no public name reaches this module.

The client side of private transfer (:mod:`lichen.research.pate.pate`), and the least a client can say of its
model: one byte a text. Every client sees the same public rows, in the same order.

References:
    Nicolas Papernot, Shuang Song, Ilya Mironov, Ananth Raghunathan, Kunal Talwar and Úlfar Erlingsson.
    "Scalable Private Learning with PATE." ICLR 2018. https://arxiv.org/abs/1802.08908

Legend: C clients, B rows, Q queries, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.expected import Expected, MetricSpec, TensorSpec
from lichen.core.message import Job, Message
from lichen.core.parameters import personal_C
from lichen.core.tree import Tree

__all__ = ["LabelVote"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LabelVoteState:
    """A block of clients in the middle of a ballot; ``votes_CQ`` is -1 where none was cast yet."""

    job: Job
    clients: tuple[int, ...]
    params_C: Tree
    fixed: Tree
    votes_CQ: Tensor


@final
@dataclass(frozen=True, slots=True)
class LabelVote:
    """Voting as a client work; no private state is written.

    Args:
        model: The clients' classifier.
        queries: Q, rows of the public shard; its source gives every client that one shard, for example an
            :class:`lichen.data.batches.shards.EvalSource` over as many times the same.
        personal: Each client's own parameters vote where it has some, else the shared ones.
        use_best: With ``personal``: its best ones so far, where it has kept some.

    Raises:
        LichenError: if the model is no classifier, or there are no queries.
    """

    model: CohortModel
    _: KW_ONLY
    queries: int
    personal: bool = True
    use_best: bool = False

    def __post_init__(self) -> None:
        if self.model.classes is None:
            raise LichenError("a language model has no classes to vote for", where="ballot", fix="use a classifier")
        if self.queries < 1:
            raise LichenError(f"{self.queries} queries", where="ballot.queries", fix="give the public rows' number")

    def expected(self, job: Job) -> Expected:
        """A vote for each query."""
        return Expected(
            group=self._group,
            tensors={"votes": TensorSpec((self.queries,), self._narrow)},
            metrics={"count": MetricSpec(0.0, self.queries)},
            weight=(0.0, 1.0),
        )

    @property
    def _group(self) -> str:
        return f"ballot/{self.queries}/{self.model.classes}"

    @property
    def _narrow(self) -> torch.dtype:
        return torch.int8 if (self.model.classes or 0) <= 128 else torch.int16

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> LabelVoteState:
        """Parameters that vote, and an empty ballot."""
        trainable, fixed = job.shared.trainable, job.shared.fixed
        params_C = personal_C(trainable, own_C if self.personal else None, len(clients), use_best=self.use_best)
        votes_CQ = torch.full((len(clients), self.queries), -1, dtype=self._narrow)
        return LabelVoteState(job=job, clients=tuple(clients), params_C=params_C, fixed=fixed, votes_CQ=votes_CQ)

    def step(self, state: LabelVoteState, batch: Batch) -> LabelVoteState:
        """The votes for one batch of public rows; the lowest class where two are alike."""
        with torch.no_grad():
            vote_CB = self.model.logits(state.params_C, state.fixed, batch).argmax(-1).cpu()
        index_CB = batch["index_CB"].cpu()
        cast_CB = (index_CB >= 0) & batch["active_C"].cpu()[:, None]
        votes_CQ = state.votes_CQ.clone()
        row_CB = torch.arange(len(state.clients))[:, None].expand_as(index_CB)
        votes_CQ[row_CB[cast_CB], index_CB[cast_CB]] = vote_CB[cast_CB].to(votes_CQ.dtype)
        return replace(state, votes_CQ=votes_CQ)

    def final(self, state: LabelVoteState) -> tuple[Message, Tree | None]:
        """``votes`` ``(C, Q)``, weight 1 where any was cast; the metric ``count`` are the votes."""
        cast_C = (state.votes_CQ >= 0).sum(1).double()
        message = Message(
            group=self._group,
            client_C=torch.tensor(state.clients, dtype=torch.int64),
            version_C=torch.full((len(state.clients),), state.job.version, dtype=torch.int64),
            tensors={"votes": state.votes_CQ},
            weight_C=(cast_C > 0).double(),
            metrics={"count": cast_C},
        )
        return message, None
