"""Distils a language model from token logits on public texts, across vocabularies.

Research: no recipe and no public name reaches this module.

The work is :class:`lichen.clients.training.train.Train` over a model that hears
(:class:`lichen.models.tokens.token_targets.DistilledLM`), with two things around it.

*Whom to believe.* FedMKT's other half: a client that keeps its own tensors believes an answer only on
texts where the teller's loss was lower than the one it told itself (``told/loss``, from
:class:`lichen.research.mutual.token_logits.ReportLogits`); on the others it learns from the text alone. A server has
chosen already (:class:`lichen.research.mutual.select.Select`).

*What it keeps.* Listening begins with a fresh optimizer and leaves the one of local training as it was: the
moments of one loss say nothing of the other.

The job brings ``answers.index`` and ``answers.prob`` ``(R, k)`` and, for clients that choose,
``answers.loss`` ``(N,)``; a client with its own tensors is sent nothing else.

References:
    Tao Fan, Guoqiang Ma, Yan Kang, Hanlin Gu, Yuanfeng Song, Lixin Fan, Kai Chen and Qiang Yang. "FedMKT:
    Federated Mutual Knowledge Transfer for Large and Small Language Models." COLING 2025.
    https://arxiv.org/abs/2406.02224
    Tao Fan, Yan Kang, Guoqiang Ma, Lixin Fan, Kai Chen and Qiang Yang. "FedCoLLM: A Parameter-Efficient
    Federated Co-tuning Framework for Large and Small Language Models." 2024.
    https://arxiv.org/abs/2411.11707

Legend: C clients, B rows of a batch, N texts, R places with a label, k answers kept of a place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.clients.training.gradient_steps import Proximal
from lichen.clients.training.train import Train, TrainState
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import Expected, MetricSpec
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.rows import TextShard
from lichen.models.tokens.token_targets import DistilledLM
from lichen.research.mutual.token_logits import REPORTED_LOSS, own_params, starts

__all__ = ["DistillLogits"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DistillLogitsState:
    """A block of clients in the middle of listening.

    Attributes:
        train: Their training.
        accepted_CN: On which texts each believes the answers.
        local_optimizer: The optimizer of local training, ``opt/...``.
    """

    train: TrainState
    accepted_CN: Tensor
    local_optimizer: Tree


@final
@dataclass(frozen=True, slots=True)
class DistillLogits:
    """Listening as a client work; serve it with a :class:`lichen.data.batches.shards.TrainSource` of the public texts.

    Args:
        inner: How it learns; its model is a :class:`lichen.models.tokens.token_targets.DistilledLM`. With ``personal``
            the clients' own tensors learn and no tensor leaves; else the difference goes up, as at a server.
        public: The texts, from :func:`lichen.research.mutual.token_logits.public_shard`, as this model's tokenizer
            has them.

    Raises:
        LichenError: if the model does not hear, or tensors would stay at home or be pulled to the shared ones.
    """

    inner: Train
    _: KW_ONLY
    public: TextShard

    def __post_init__(self) -> None:
        if not isinstance(self.inner.model, DistilledLM):
            raise LichenError("the model hears no answers", where="listen.train", fix="wrap it in DistilledLM")
        pulled = any(isinstance(step, Proximal) for step in self.inner.gradient_steps)
        if self.inner.local_params or (self.inner.personal and pulled):
            raise LichenError(
                "listening trains all tensors, and knows no shared ones to be pulled to",
                where="listen.train",
                fix="leave home and prox out",
            )

    def expected(self, job: Job) -> Expected:
        """The training's, with how many texts were believed."""
        inner = self.inner.expected(job)
        return replace(inner, metrics={**inner.metrics, "believed": MetricSpec(0.0, self.public.size)})

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> DistillLogitsState:
        """Clients at their own tensors or at the job's, and what each believes.

        Raises:
            LichenError: if answers are missing or are not as many as there are places, or a client that
                keeps its own tensors has none, or has not told.
        """
        personal, at = self.inner.personal, starts(self.public)
        params_C, _ = own_params(job, clients, own_C, personal=personal)
        answers = job.shared.frozen
        index = answers.get("answers.index")
        if index is None or "answers.prob" not in answers or len(index) != int(at[-1]):
            raise LichenError(
                f"answers at {0 if index is None else len(index)} places, the texts have {int(at[-1])}",
                where=f"job {job.work!r}",
                fix="let everybody hold the same public texts",
            )
        answers = {**answers, "answers.at": at.to(index.device)}
        answer_loss_N = answers.pop("answers.loss", None)
        shared = replace(job.shared, frozen=answers)
        accepted_CN = torch.ones(len(clients), self.public.size, dtype=torch.bool)
        own = dict(own_C or {})
        if personal:
            # The place of the shared tensors, whose values nobody looks at: each client begins at its own.
            shared |= Shared(trees.take(params_C, 0))
            own_loss_CN = own.pop(REPORTED_LOSS, None)
            if answer_loss_N is None or own_loss_CN is None or own_loss_CN.shape != accepted_CN.shape:
                raise LichenError(
                    "losses are missing, so nobody knows whom to believe",
                    where=f"job {job.work!r}",
                    fix="let every client tell before it listens",
                )
            accepted_CN = (answer_loss_N.to(own_loss_CN) < own_loss_CN).cpu()
        local_optimizer, rest = trees.split(own, "opt/")
        state = self.inner.init(replace(job, shared=shared), clients, rest or None)
        return DistillLogitsState(
            train=state, accepted_CN=accepted_CN, local_optimizer=trees.join("opt/", local_optimizer, {})
        )

    def step(self, state: DistillLogitsState, batch: Batch) -> DistillLogitsState:
        """One optimizer step of every active client on the public rows of its batch."""
        row_CB = batch["index_CB"].cpu()
        accepted_CB = state.accepted_CN.gather(1, row_CB.clamp(min=0)) & (row_CB >= 0)
        answered = {**batch, "answer_CB": torch.where(accepted_CB, row_CB, -1)}
        return replace(state, train=self.inner.step(state.train, answered))

    def final(self, state: DistillLogitsState) -> tuple[Message, Tree | None]:
        """The training's message, with the metric ``believed``: texts whose answers were taken.

        The private state goes on with the learned tensors, and with the optimizer as it was before.
        """
        message, own_C = self.inner.final(state.train)
        accepted_C = state.accepted_CN.sum(1).to(message.weight_C)
        message = replace(message, metrics={**message.metrics, "believed": accepted_C})
        if own_C is not None:
            _, rest = trees.split(own_C, "opt/")
            own_C = {**rest, **state.local_optimizer}
        return message, own_C
