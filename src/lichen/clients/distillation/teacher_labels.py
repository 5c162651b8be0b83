"""Asks a client's foundation model for labels of public rows; class probabilities leave, nothing else.

This is the path for models that may not or cannot be shared: a remote service, a licensed model, a
model of another architecture. The job's texts go down, and up come the positions and probabilities of
the ``top_k`` classes per text, in one or two bytes and two bytes each, so that counted bytes are the
honest price of an answer. A model that labels without training is
:class:`lichen.fm.zero_shot.ZeroShot`; one with a trained head is :class:`LocalTeacher`.

References:
    Geoffrey Hinton, Oriol Vinyals and Jeff Dean. "Distilling the Knowledge in a Neural Network." NIPS
    Deep Learning Workshop 2014. https://arxiv.org/abs/1503.02531
    Daliang Li and Junpu Wang. "FedMD: Heterogenous Federated Learning via Model Distillation." NeurIPS
    Workshop on Federated Learning 2019. https://arxiv.org/abs/1910.03581

Legend: C clients, N texts, k answers kept per text, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import Expected, MetricSpec, TensorSpec
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.fm.zero_shot import Answer, Teacher

__all__ = ["Answer", "AnswerWork", "LocalTeacher", "NoBatches", "Teacher"]


@final
class LocalTeacher:
    """A classifier behind the one call of a :class:`Teacher`: the model lives in a closure.

    Args:
        classify: Logits ``(N, K)`` of some texts.
        classes: Names of the K classes.
        top_k: Pairs told per text.
        batch: Texts asked at once.

    >>> teacher = LocalTeacher(lambda texts: torch.tensor([[0.0, 1.0]] * len(texts)), classes=("no", "yes"), top_k=1)
    >>> [(label, round(p, 3)) for label, p in teacher.answer(["is it?"])[0].top]
    [('yes', 0.731)]
    """

    __slots__ = ("answer",)
    answer: Callable[[Sequence[str]], list[Answer]]

    def __init__(
        self, classify: Callable[[Sequence[str]], Tensor], *, classes: Sequence[str], top_k: int, batch: int = 32
    ) -> None:
        names = _check_classes(classes, top_k)

        def answer(texts: Sequence[str]) -> list[Answer]:
            answers: list[Answer] = []
            for start in range(0, len(texts), batch):
                with torch.no_grad():
                    chance_NK = classify(texts[start : start + batch]).double().softmax(-1)
                chance_Nk, index_Nk = chance_NK.sort(dim=-1, descending=True, stable=True)
                for chances, indices in zip(chance_Nk.tolist(), index_Nk.tolist(), strict=True):
                    top = tuple((names[i], p) for i, p in zip(indices[:top_k], chances[:top_k], strict=True))
                    answers.append(Answer(top[0][0], top=top))
            return answers

        self.answer = answer


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerState:
    """The question and who is asked."""

    job: Job
    clients: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class AnswerWork:
    """Black-box answers as a client work: the job's texts in, class positions and probabilities out.

    Args:
        teacher: Who is asked.
        classes: Names of the K classes, in the federation's order.
        top_k: Answers kept per text, k.

    Raises:
        LichenError: if the classes repeat or ``top_k`` does not fit them.
    """

    teacher: Teacher
    _: KW_ONLY
    classes: tuple[str, ...]
    top_k: int = 1

    def __post_init__(self) -> None:
        _check_classes(self.classes, self.top_k)

    def expected(self, job: Job) -> Expected:
        """An answer to each text."""
        texts, shape = float(len(job.texts)), (len(job.texts), self.top_k)
        return Expected(
            group=self._group,
            tensors={"index": TensorSpec(shape, self._narrow), "prob": TensorSpec(shape, torch.float16)},
            metrics={"count": MetricSpec(texts, texts), "unknown": MetricSpec(0.0, texts * self.top_k)},
            weight=(texts, texts),
        )

    @property
    def _group(self) -> str:
        return f"answers/{len(self.classes)}/{self.top_k}"

    @property
    def _narrow(self) -> torch.dtype:
        return torch.int8 if len(self.classes) <= 128 else torch.int16

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> AnswerState:
        """The question."""
        return AnswerState(job=job, clients=tuple(clients))

    def step(self, state: AnswerState, batch: Batch) -> AnswerState:
        """Answers need no batches; see :class:`NoBatches`."""
        return state

    def final(self, state: AnswerState) -> tuple[Message, Tree | None]:
        """``index`` ``(1, N, k)`` int8, int16 beyond 128 classes, and ``prob`` ``(1, N, k)`` float16.

        A pair naming no known class, or with a probability outside [0, 1], becomes index -1 with
        probability 0 and is counted in the metric ``unknown``.

        Raises:
            LichenError: if the teacher does not give one answer a text, or several clients share it.
        """
        if len(state.clients) != 1:
            raise LichenError(
                "one teacher cannot answer for several clients", where="answer", fix="serve it with NoBatches"
            )
        texts = state.job.texts
        answers = self.teacher.answer(texts)
        if len(answers) != len(texts):
            raise LichenError(
                f"the teacher gave {len(answers)} answers to {len(texts)} texts",
                where="answer.teacher",
                fix="return one Answer per text, in order",
            )
        position = {name: i for i, name in enumerate(self.classes)}
        shape = (1, len(texts), self.top_k)
        index_CNk = torch.full(shape, -1, dtype=self._narrow)
        prob_CNk = torch.zeros(shape, dtype=torch.float16)
        unknown = 0
        for row, answer in enumerate(answers):
            pairs = (answer.top or ((answer.label, 1.0),))[: self.top_k]
            for column, (label, chance) in enumerate(pairs):
                if label in position and math.isfinite(chance) and 0 <= chance <= 1 + 1e-6:
                    index_CNk[0, row, column] = position[label]
                    prob_CNk[0, row, column] = min(chance, 1.0)
                else:
                    unknown += 1
        one_C = torch.ones(1, dtype=torch.float64)
        message = Message(
            group=self._group,
            client_C=torch.tensor(state.clients, dtype=torch.int64),
            version_C=torch.tensor([state.job.version], dtype=torch.int64),
            tensors={"index": index_CNk, "prob": prob_CNk},
            weight_C=one_C * len(texts),
            metrics={"count": one_C * len(texts), "unknown": one_C * unknown},
        )
        return message, None


@final
class NoBatches:
    """The source of works that need no rows; every client is served by itself."""

    __slots__ = ()

    def shape(self, client: int) -> Hashable:
        """The client itself, so that no two share a block."""
        return client

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """Nothing."""
        return iter(())


def _check_classes(classes: Sequence[str], top_k: int) -> tuple[str, ...]:
    if len(set(classes)) != len(classes):
        raise LichenError("a class is named twice", where="answer.classes", fix="name each class once")
    if not 1 <= len(classes) <= 32767:
        raise LichenError(f"{len(classes)} classes", where="answer.classes", fix="use 1 to 32767")
    if not 1 <= top_k <= len(classes):
        raise LichenError(f"{top_k} of {len(classes)} classes", where="answer.top_k", fix="use 1 to the class count")
    return tuple(classes)
