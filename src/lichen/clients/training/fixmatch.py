"""FixMatch and FlexMatch: pseudo-labels from weakly augmented rows train the model on strongly augmented ones.

:class:`FixMatch` goes around :class:`lichen.clients.training.train.Train`. In every step the client's own rows
without a label (``labels_CB`` = -100, ``index_CB`` >= 0) are seen in a weak view by the model as it is now; where
the likeliest class has at least ``threshold``, it becomes the row's label, and the strong view is to say the same:

    mean over labelled rows of CE(weak view, label)
    + weight * mean over unlabelled rows of [sure] CE(strong view, label of the weak view)

With ``rows`` the threshold of a class grows with how many rows of it are learned (FlexMatch): hard classes get in
early. For some rounds labels may come from a teacher that has answered for the client's own rows: zero-shot labels of
a foundation model. A client that has no unlabelled row in a step takes the wrapped step, bit for bit; one that has,
but is sure of none and holds no label there, does not step.

References:
    Kihyuk Sohn, David Berthelot, Chun-Liang Li, Zizhao Zhang, Nicholas Carlini, Ekin D. Cubuk, Alex
    Kurakin, Han Zhang and Colin Raffel. "FixMatch: Simplifying Semi-Supervised Learning with Consistency
    and Confidence." NeurIPS 2020. https://arxiv.org/abs/2001.07685
    Bowen Zhang, Yidong Wang, Wenxin Hou, Hao Wu, Jindong Wang, Manabu Okumura and Takahiro Shinozaki.
    "FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling." NeurIPS 2021.
    https://arxiv.org/abs/2110.08263

Legend: C clients, B rows, K classes, R rows of a client's shard, k answers kept of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.clients.training.soft_targets import TargetLoss, pseudo_labels_CB
from lichen.clients.training.train import Train, TrainState
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import COUNT, Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.data.batches.augment import Views

__all__ = ["FixMatch", "thresholds_CK"]

_UNUSED = -1


def thresholds_CK(table_CR: Tensor, unlabelled_C: Tensor, classes: int, threshold: float) -> Tensor:
    """FlexMatch's thresholds: ``threshold * b / (2 - b)``, b a class's share of the class learned best.

    How far a class is learned is the number of rows that were last surely of it. While more rows were never sure of
    any class, those that no step has seen among them, their number stands for the best.

    Args:
        table_CR: The class each row was last surely of, -1 where it never was.
        unlabelled_C: Unlabelled rows of each client.
        classes: K.
        threshold: That of the class learned best.

    >>> table = torch.tensor([[0, 0, 0, 0, 1, 1, -1, -1]])
    >>> thresholds_CK(table, torch.tensor([8]), 3, 0.9)
    tensor([[0.9000, 0.3000, 0.0000]], dtype=torch.float64)
    """
    learned_CK = torch.stack([(table_CR == k).sum(1) for k in range(classes)], 1).double()
    best_C = torch.maximum(learned_CK.amax(1), unlabelled_C.double() - learned_CK.sum(1))
    share_CK = learned_CK / best_C.clamp(min=1).unsqueeze(1)
    return threshold * share_CK / (2 - share_CK)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FixMatchState:
    """The wrapped state, steps done, and what is known of the rows.

    Attributes:
        inner: The training's.
        step: Steps so far.
        initial_CR: The table as it came, int32; ``(C, 0)`` where none is kept.
        table_CR: As for :func:`thresholds_CK`.
        sums: ``(C,)`` float64: ``unlabelled`` rows seen, and how many of them got a ``pseudo`` label.
    """

    inner: TrainState
    step: int
    initial_CR: Tensor
    table_CR: Tensor
    sums: Tree


@final
@dataclass(frozen=True, slots=True)
class FixMatch:
    """Training that also learns from the client's unlabelled rows.

    What a client's weight counts as an example is a labelled row, or one that got a label here. With
    ``rows`` the private state has ``semi/table``, int32 ``(rows,)``: it lasts over a client's rounds.

    Args:
        inner: What is done with labelled rows.
        views: Makes weak and strong views.
        threshold: How likely a class must be.
        weight: λ of the unlabelled rows' loss.
        rows: Rows of the largest client: each class gets a threshold of its own. None: one for all.
        unlabelled: With ``rows``, how many of its rows each client has no label of, by its number.
        teacher_rounds: In the job's versions below this, rows that have a teacher's answer get its label.
        warm: In versions below this nobody labels anything: a model that knows nothing yet is sure of the wrong.

    Raises:
        LichenError: if a value is out of range, or the model is no classifier.
    """

    inner: Train
    views: Views
    _: KW_ONLY
    threshold: float = 0.95
    weight: float = 1.0
    rows: int | None = None
    unlabelled: Sequence[int] = ()
    teacher_rounds: int = 0
    warm: int = 0

    def __post_init__(self) -> None:
        if self.inner.model.classes is None:
            raise LichenError("a language model has no class to be sure of", where="semi", fix="use task: classify")
        if not 0 <= self.threshold <= 1:
            raise LichenError(f"{self.threshold} is no probability", where="semi.threshold", fix="use 0.8 to 0.95")
        if not 0 <= self.weight < math.inf:
            raise LichenError(f"{self.weight} is out of range", where="semi.weight", fix="use 0 or more")
        if self.rows is not None and self.rows < 1:
            raise LichenError(f"{self.rows} rows", where="FixMatch.rows", fix="use the rows of the largest client")

    def expected(self, job: Job) -> Expected:
        """The wrapped work's, with the two counts of unlabelled rows."""
        inner = self.inner.expected(job)
        return replace(inner, metrics={**inner.metrics, "unlabelled": COUNT, "pseudo": COUNT})

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> FixMatchState:
        """The wrapped work's beginning; it does not see the table.

        Raises:
            LichenError: if the table that was kept has another size, or a client's unlabelled rows are not known.
        """
        retained, own = trees.split(own_C or {}, "semi/")
        fresh_CR = torch.full((len(clients), self.rows or 0), _UNUSED, dtype=torch.int32)
        table_CR = retained["table"].cpu() if self.rows and "table" in retained else fresh_CR
        if table_CR.shape != fresh_CR.shape:
            raise LichenError(
                f"the table is of {table_CR.shape[1]} rows", where="private state", fix="start a new run folder"
            )
        if self.rows and any(client >= len(self.unlabelled) for client in clients):
            raise LichenError(
                "not every client has its number", where="FixMatch.unlabelled", fix="give one for each client"
            )
        return FixMatchState(
            inner=self.inner.init(job, clients, own or None),
            step=0,
            initial_CR=table_CR,
            table_CR=table_CR,
            sums={name: torch.zeros(len(clients), dtype=torch.float64) for name in ("unlabelled", "pseudo")},
        )

    def step(self, state: FixMatchState, batch: Batch) -> FixMatchState:
        """The wrapped step, with what the unlabelled rows of each client are now found to be.

        Raises:
            LichenError: if a client has more rows than the table, or answers are named but not there.
        """
        free_CB = (batch["index_CB"] >= 0) & (batch["labels_CB"] < 0) & batch["active_C"].unsqueeze(1)
        some_C = free_CB.any(1)
        if not bool(some_C.any()) or state.inner.job.version < self.warm:
            return replace(state, inner=self.inner.step(state.inner, batch), step=state.step + 1)
        job, clients = state.inner.job, state.inner.clients
        weak, strong = (
            self.views.view(batch, kind, seed=job.seed, clients=clients, step=state.step) for kind in ("weak", "strong")
        )
        chance_CB, label_CB = self._found(state.inner, weak, free_CB)
        limit_CB = torch.full_like(chance_CB, self.threshold)
        table_CR = state.table_CR
        if self.rows is not None:
            unlabelled_C = torch.tensor([self.unlabelled[client] for client in clients])
            limit_CK = thresholds_CK(table_CR, unlabelled_C, int(self.inner.model.classes or 0), self.threshold)
            limit_CB = limit_CK.gather(1, label_CB).to(chance_CB)
            table_CR = self._entered(table_CR, batch["index_CB"], free_CB, label_CB, chance_CB)
        sure_CB = free_CB & (chance_CB >= limit_CB)
        share_C = self.weight / free_CB.sum(1).clamp(min=1)
        target_CBK = torch.nn.functional.one_hot(label_CB, int(self.inner.model.classes or 0)).float()
        target_CBK = target_CBK * (sure_CB * share_C.unsqueeze(1)).unsqueeze(-1)
        labelled_CB = batch["labels_CB"] >= 0
        ready = {**batch, "target_CBK": target_CBK}
        for name, x in batch.items():
            if x is not weak[name] or x is not strong[name]:
                lightly = _where(some_C.unsqueeze(1).expand_as(free_CB), weak[name], x)
                ready[name] = _where(free_CB, strong[name], lightly)
        if "answer_CB" in batch:
            # These rows' answers are used here or not at all.
            ready["answer_CB"] = batch["answer_CB"].masked_fill(free_CB, -1)
            labelled_CB = labelled_CB | (ready["answer_CB"] >= 0)
        ready["active_C"] = batch["active_C"] & (~some_C | (sure_CB | labelled_CB).any(1))
        seen = {"unlabelled": free_CB.sum(1), "pseudo": sure_CB.sum(1)}
        return replace(
            state,
            inner=replace(self.inner, model=TargetLoss(self.inner.model)).step(state.inner, ready),
            step=state.step + 1,
            table_CR=table_CR,
            sums={name: total + seen[name] for name, total in state.sums.items()},
        )

    def _found(self, inner: TrainState, weak: Batch, free_CB: Tensor) -> tuple[Tensor, Tensor]:
        """``(chance_CB, label_CB)`` on the host: the likeliest class of each row, by model or teacher."""
        params_C = {**inner.params_C, **inner.frozen_C}
        chance_CB, label_CB = pseudo_labels_CB(self.inner.model, params_C, inner.fixed, weak)
        if inner.job.version < self.teacher_rounds and "answer_CB" in weak:
            teacher_CB = free_CB & (weak["answer_CB"] >= 0)
            chance_Nk, index_Nk = (_answers(inner.fixed, name) for name in ("prob", "index"))
            best_N = chance_Nk.float().argmax(1, keepdim=True)
            row_CB = weak["answer_CB"].clamp(min=0)
            chance_CB = torch.where(teacher_CB, chance_Nk.gather(1, best_N)[:, 0].float()[row_CB], chance_CB)
            label_CB = torch.where(teacher_CB, index_Nk.long().gather(1, best_N)[:, 0][row_CB], label_CB)
        return chance_CB, label_CB

    def _entered(
        self, table_CR: Tensor, index_CB: Tensor, free_CB: Tensor, label_CB: Tensor, chance_CB: Tensor
    ) -> Tensor:
        most = int(index_CB.max())
        if most >= table_CR.shape[1]:
            raise LichenError(
                f"a client has more than {most} rows", where="FixMatch.rows", fix="give the rows of the largest client"
            )
        c_R, b_R = (free_CB & (chance_CB >= self.threshold)).nonzero(as_tuple=True)
        entered_CR = table_CR.clone()
        entered_CR[c_R, index_CB[c_R, b_R]] = label_CB[c_R, b_R].to(table_CR.dtype)
        return entered_CR

    def final(self, state: FixMatchState) -> tuple[Message, Tree | None]:
        """The wrapped work's message, with the metrics ``unlabelled`` and ``pseudo``; and its private state."""
        message, own_C = self.inner.final(state.inner)
        message = replace(message, metrics={**message.metrics, **state.sums})
        if self.rows is None:
            return message, own_C
        finite_C1 = (message.metrics["failed"].cpu() == 0).unsqueeze(1)
        table_CR = torch.where(finite_C1, state.table_CR, state.initial_CR)
        return message, trees.join("semi/", {"table": table_CR}, own_C or {})


def _answers(fixed: Tree, name: str) -> Tensor:
    if f"answers.{name}" not in fixed:
        raise LichenError("rows name a teacher's answers, but none came down", where="job")
    return fixed[f"answers.{name}"].cpu()


def _where(mask_CB: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask_CB.view(*mask_CB.shape, *[1] * (a.dim() - 2)), a, b)
