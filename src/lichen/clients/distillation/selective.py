"""Selective distillation: a client follows the teacher only where the teacher's loss is below its own.

A teacher is not better everywhere: it may never have seen a client's words, or call one class by
another's name, and a small student that learns such answers gets worse for having been taught. Every
client therefore keeps some labelled rows to judge by. On these it counts, for every class a *the teacher
names*, how often the teacher was right there and how often its own model was, and takes answers that
name a only where the teacher was right more often:

    d_a = (Σ_{i: teacher says a} (teacher right_i − own right_i) + m d̄) / (n_a + m),    take a: d_a > 0

with d̄ the mean difference over all judged rows, which stands in, with the weight of m rows, where few
rows of a class were seen. What the teacher *says* is what counts, for it is all that is known of an
unlabelled public row. A client without a row to judge by has no reason to differ, and takes all.

The own model is the one the client is about to train: the shared one, or its personal one. Rows it has
been trained on flatter it, so judge on others, such as the rows for validation.

Answers of some classes alone shift a student's balance towards these: where few are taken, the weight of
answers against labels (``answers.weight``) is better small.

Where data flows: the teacher's answers to a client's own rows (``teacher_label_M``) are made on the client's own
machine, by a teacher that runs there or by one the client itself asks; they lie in this object and are
never part of a job or message. The counts and the choice go into the private state. What leaves is what
:class:`lichen.clients.training.train.Train` sends, and no text.

References:
    Tao Fan, Guoqiang Ma, Yan Kang, Hanlin Gu, Yuanfeng Song, Lixin Fan, Kai Chen and Qiang Yang. "FedMKT:
    Federated Mutual Knowledge Transfer for Large and Small Language Models." COLING 2025.
    https://arxiv.org/abs/2406.02224 (its rule, take what beats one's own, here by class instead of by row)

Legend: C clients, B rows, K classes, M answers to clients' own rows, N public answers, k kept of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.clients.training.train import Train, TrainState
from lichen.core.contracts.client import Source
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.seeds import derive
from lichen.core.tree import Tree

__all__ = ["Selective", "agreement_with_teacher", "predicted_labels", "trusted"]

OWN = "trust/"
"""Prefix in the private state."""


def predicted_labels(answers: Tree) -> Tensor:
    """The class each answer names, int64 ``(N,)``: that of its likeliest pair, -1 where none is known.

    >>> predicted_labels({"answers.prob": torch.tensor([[0.2, 0.7]]), "answers.index": torch.tensor([[4, 1]])}).tolist()
    [1]
    """
    prob_Nk, index_Nk = answers["answers.prob"].float(), answers["answers.index"].long()
    prob_Nk = torch.where(index_Nk >= 0, prob_Nk, -1.0)
    return index_Nk.gather(1, prob_Nk.argmax(1, keepdim=True))[:, 0]


def agreement_with_teacher(
    model: CohortModel, params_C: Tree, fixed: Tree, teacher_label_M: Tensor, batch: Batch
) -> Tree:
    """Counts over one batch of a client's own rows, by the class the teacher names; float64 ``(C, K)`` each.

    Args:
        model: The clients' classifier.
        params_C: Its parameters.
        fixed: What else came down.
        teacher_label_M: The class the teacher names for each of the clients' own rows; ``answer_CB`` points here.
        batch: Rows with labels and answers; all others count for nothing.

    Returns:
        ``rows``, ``teacher`` and ``own``: rows, and how many of them each got right.
    """
    assert model.classes is not None
    device = next(iter(params_C.values())).device
    labels_CB, answer_CB = batch["labels_CB"].to(device), batch["answer_CB"].to(device)
    predicted_label_CB = torch.where(answer_CB >= 0, teacher_label_M.to(device)[answer_CB.clamp(min=0)], -1)
    counted_CB = (labels_CB >= 0) & (predicted_label_CB >= 0) & batch["active_C"].to(device)[:, None]
    with torch.no_grad():
        own_CB = model.logits(params_C, fixed, batch).argmax(-1)
    one_CBK = (
        torch.nn.functional.one_hot(predicted_label_CB.clamp(min=0), model.classes).double() * counted_CB[..., None]
    )
    right = {"rows": counted_CB, "teacher": predicted_label_CB == labels_CB, "own": own_CB == labels_CB}
    return {name: (one_CBK * x_CB[..., None]).sum(1) for name, x_CB in right.items()}


def trusted(counts: Tree, *, prior: float) -> Tensor:
    """Whether each client takes answers that name each class, bool ``(C, K)``.

    Args:
        counts: From :func:`agreement_with_teacher`, summed.
        prior: m > 0, rows that the mean over all classes stands for.

    >>> rows, own = torch.tensor([[4.0, 4.0]]), torch.tensor([[2.0, 2.0]])
    >>> trusted({"rows": rows, "teacher": torch.tensor([[4.0, 0.0]]), "own": own}, prior=1.0).tolist()
    [[True, False]]
    """
    better_CK, rows_CK = counts["teacher"] - counts["own"], counts["rows"]
    rows_C1 = rows_CK.sum(1, keepdim=True)
    mean_C1 = better_CK.sum(1, keepdim=True) / rows_C1.clamp(min=1)
    return ((better_CK + prior * mean_C1) / (rows_CK + prior) > 0) | (rows_C1 == 0)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SelectiveState:
    """A block of clients in the middle of training.

    Attributes:
        inner: Of the wrapped work.
        own_C: The private state as it came.
        counts: What the judged rows said, ``(C, K)`` each.
        trust_CK: Whose word is taken, by the class it names.
        predicted_label_N: The class each public answer names; None where no answers came down.
    """

    inner: TrainState
    own_C: Tree
    counts: Tree
    trust_CK: Tensor
    predicted_label_N: Tensor | None


@final
@dataclass(frozen=True, slots=True)
class Selective:
    """Training in which each client leaves out the teacher's answers it has no reason to believe.

    A row that loses its answer teaches nothing, unless it has a label. Clients judge anew in every job.

    Args:
        inner: The training.
        judge: The clients' labelled rows to judge by, ``answer_CB`` pointing into ``teacher_label_M``: for example
            an :class:`lichen.data.batches.shards.EvalSource` over their validation rows.
        teacher_label_M: The class the teacher names for each of those rows, -1 for none (:func:`predicted_labels`).
        prior: m above.

    Raises:
        LichenError: if the model is no classifier, or m is not positive.
    """

    inner: Train
    _: KW_ONLY
    judge: Source
    teacher_label_M: Tensor
    prior: float = 2.0

    def __post_init__(self) -> None:
        if self.inner.model.classes is None:
            raise LichenError("a language model names no classes", where="selective", fix="use it with classifiers")
        if not 0 < self.prior < math.inf:
            raise LichenError(
                f"{self.prior} is not positive", where="selective.prior", fix="use a number > 0, such as 2"
            )

    def expected(self, job: Job) -> Expected:
        """The training's."""
        return self.inner.expected(job)

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> SelectiveState:
        """Judge, then begin to train.

        Raises:
            LichenError: if a row to judge by has no place for an answer, or as :class:`Train` does.
        """
        inner = self.inner.init(job, clients, own_C)
        params_C = {**inner.initial_C, **inner.frozen_C}
        zero_CK = torch.zeros(len(clients), self.inner.model.classes or 0, dtype=torch.float64)
        counts = dict.fromkeys(("rows", "teacher", "own"), zero_CK.to(next(iter(params_C.values())).device))
        # One client after the other: these rows are few, and their shapes need not match.
        for c, client in enumerate(clients):
            alone_C = {name: x[c : c + 1] for name, x in params_C.items()}
            for batch in self.judge.batches((client,), derive(job.seed, "judge")):
                if "answer_CB" not in batch:
                    raise LichenError(
                        f"the rows of client {client} to judge by name no answers",
                        where="selective.judge",
                        fix="let their shard's answer point into said_M",
                    )
                more = agreement_with_teacher(self.inner.model, alone_C, inner.fixed, self.teacher_label_M, batch)
                at = torch.tensor([c], device=more["rows"].device)
                counts = {name: x.index_add(0, at, more[name]) for name, x in counts.items()}
        return SelectiveState(
            inner=inner,
            own_C=dict(own_C or {}),
            counts=counts,
            trust_CK=trusted(counts, prior=self.prior),
            predicted_label_N=predicted_labels(inner.fixed) if "answers.index" in inner.fixed else None,
        )

    def step(self, state: SelectiveState, batch: Batch) -> SelectiveState:
        """One step of the training, without the answers that are not taken."""
        if state.predicted_label_N is not None and "answer_CB" in batch:
            answer_CB = batch["answer_CB"].to(state.predicted_label_N.device)
            predicted_label_CB = torch.where(answer_CB >= 0, state.predicted_label_N[answer_CB.clamp(min=0)], -1)
            accepted_CB = state.trust_CK.gather(1, predicted_label_CB.clamp(min=0)) & (predicted_label_CB >= 0)
            batch = {**batch, "answer_CB": torch.where(accepted_CB, answer_CB, -1)}
        return replace(state, inner=self.inner.step(state.inner, batch))

    def final(self, state: SelectiveState) -> tuple[Message, Tree | None]:
        """The message of the training; the private state gains ``trust/taken`` and the counts, ``(C, K)``."""
        message, own_C = self.inner.final(state.inner)
        judged = {f"{OWN}{name}": x for name, x in state.counts.items()}
        return message, {**state.own_C, **(own_C or {}), **judged, f"{OWN}taken": state.trust_CK.to(torch.uint8)}
