"""Distils a student from a teacher on public rows, before the first round or within a client.

The server knows public texts and can ask a foundation model; it needs no client to make a first
student of that. Being a node like any other, it runs the clients' own fold with a cohort of one:
:class:`Distill` is local training whose answers lie here instead of coming down with the job, and whose
helpers, such as the projections of :class:`lichen.models.layerwise_distillation.Layerwise`, are trained along and left
behind. A client with a teacher of its own runs the same work. Clients that then start from such a student
begin where the public texts end (the warm start of ensemble distillation in FedDF, turned around).

References:
    Geoffrey Hinton, Oriol Vinyals and Jeff Dean. "Distilling the Knowledge in a Neural Network." NIPS
    Deep Learning Workshop 2014. https://arxiv.org/abs/1503.02531
    Iulia Turc, Ming-Wei Chang, Kenton Lee and Kristina Toutanova. "Well-Read Students Learn Better: On
    the Importance of Pre-training Compact Models." 2019. https://arxiv.org/abs/1908.08962 (distilled on
    unlabelled text first, trained on labels after)
    Tao Lin, Lingjing Kong, Sebastian U. Stich and Martin Jaggi. "Ensemble Distillation for Robust Model
    Fusion in Federated Learning." NeurIPS 2020. https://arxiv.org/abs/2006.07242

Legend: N public rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, final

import numpy as np
from torch import Tensor

from lichen.clients.training.gradient_steps import Clip
from lichen.clients.training.optimize import ClientOptimizer, Schedule, lr_factor
from lichen.clients.training.train import Train
from lichen.core.contracts.client import ClientWork
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.expected import Expected
from lichen.core.fold import fold
from lichen.core.message import Job, Message
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.core.wrapping import innermost
from lichen.data.batches.shards import Shard, TrainSource
from lichen.models.layerwise_distillation import EncoderStates, Layers, Layerwise, Open

__all__ = ["Distill", "pre_distil", "public_source"]

LogLine = Mapping[str, float]
"""``step`` (from 1), ``loss`` (mean over rows since the line before) and ``lr``."""


@final
@dataclass(frozen=True, slots=True)
class Distill:
    """Training with a teacher at hand, as a client work.

    Args:
        inner: How it is trained (:class:`Train`, or what goes around it); its model may have more tensors than the
            job brings.
        answers: ``answers.*`` that this node holds; those of the job, of the same names, come first.
        helpers: Where those further tensors begin; they are trained along and never sent.

    Raises:
        LichenError: if the answers have other names, or helpers would have to outlive a job.
    """

    inner: ClientWork
    _: KW_ONLY
    answers: Tree = field(default_factory=dict)
    helpers: Tree = field(default_factory=dict)

    def __post_init__(self) -> None:
        odd = self.answers.keys() - self._here.fixed.keys()
        if odd:
            raise LichenError(f"{min(odd)!r} is no answer", where="distill.answers", fix="call it answers.prob")
        train = innermost(self.inner)
        if self.helpers and isinstance(train, Train) and train.personal:
            raise LichenError(
                "helpers are left behind after every job, personal training keeps all",
                where="distill.helpers",
                fix="train shared tensors, or teach by answers alone",
            )

    def expected(self, job: Job) -> Expected:
        """The training's, without the helpers."""
        inner = self.inner.expected(replace(job, shared=self._here | job.shared))
        return replace(inner, tensors={name: x for name, x in inner.tensors.items() if name not in self.helpers})

    @property
    def _here(self) -> Shared:
        return Shared(self.helpers, frozen=self.answers)

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> Any:
        """Clients side by side, with the answers and the helpers beside what came down; raises as :class:`Train`."""
        device = job.shared.device
        here = self._here if device is None else self._here.to(device)
        return self.inner.init(replace(job, shared=here | job.shared), clients, own_C)

    def step(self, state: Any, batch: Batch) -> Any:
        """One optimizer step."""
        return self.inner.step(state, batch)

    def final(self, state: Any) -> tuple[Message, Tree | None]:
        """The message of :class:`Train`, without the helpers."""
        message, own_C = self.inner.final(state)
        sent = {name: x for name, x in message.tensors.items() if name not in self.helpers}
        return replace(message, tensors=sent), own_C


def public_source(public: Shard, *, batch: int, steps: int, pad: int = 0, max_length: int | None = None) -> TrainSource:
    """Shuffled batches of public rows for node 0; row i belongs to answer i where the shard names none.

    Args:
        public: The rows; labels it has teach as well.
        batch: Rows of a batch.
        steps: Batches in all.
        pad: Padding token.
        max_length: Longer rows are cut on the right.
    """
    answer = np.arange(public.size, dtype=np.int64) if public.answer is None else public.answer
    return TrainSource(
        {0: replace(public, answer=answer)}, batch_size=batch, steps=steps, pad=pad, max_length=max_length
    )


def pre_distil(
    model: CohortModel,
    start: Shared,
    public: Shard,
    answers: Tree,
    *,
    steps: int,
    lr: float,
    seed: int,
    layers: Layers | None = None,
    teacher: EncoderStates | None = None,
    words_V: Tensor | None = None,
    batch: int = 32,
    pad: int = 0,
    max_length: int | None = None,
    schedule: Schedule = "cosine",
    clip: float | None = 1.0,
    lines: int = 20,
    device: str = "cpu",
) -> tuple[Shared, list[LogLine]]:
    """A student distilled at the server.

    Args:
        model: The student.
        start: Its tensors, without client axis; answers and patches are left alone.
        public: Rows whose ``answer``, or else whose number, points into the answers; where layers are
            followed, they are in the teacher's tokens.
        answers: ``answers.prob`` and ``answers.index``, and any of
            :func:`lichen.models.losses.answer_settings`; empty: layers and labels alone teach.
        steps: Of AdamW.
        lr: Its rate at the beginning.
        seed: Of the rows' order and the projections.
        layers: Which layers follow which; needs ``teacher``.
        teacher: Whose layers.
        words_V: The student's token for each of the teacher's
            (:func:`lichen.models.layerwise_distillation.renumbering`).
        batch: Rows of a batch.
        pad: Padding token of ``public``.
        max_length: Longer rows are cut.
        schedule: How the rate falls.
        clip: Gradient norm of a step is cut to this; None: never.
        lines: At most so many lines of the log.
        device: Where it is trained.

    Returns:
        ``(start's tensors after training, log)``.

    Raises:
        LichenError: if layers and teacher do not come together, nothing would teach, or it diverges.
    """
    if (layers is None) != (teacher is None):
        raise LichenError("layers and a teacher come together or not at all", where="pre_distil", fix="give both")
    if not answers and layers is None and not any(bool((np.asarray(y) >= 0).any()) for y in public.labels):
        raise LichenError("there is nothing to learn from", where="pre_distil", fix="give answers, or layers")
    helpers: Tree = {}
    if layers is not None and teacher is not None:
        wrapped = Layerwise(_open(model), teacher, layers, words_V=words_V)
        model, helpers = wrapped, wrapped.projections(derive(seed, "projections"))
    cut = () if clip is None else (Clip(clip),)
    train = Train(model, optimizer=ClientOptimizer("adamw", lr=lr), gradient_steps=cut)
    work = Distill(train, answers=answers, helpers=helpers)
    shared = replace(start, frozen={}).to(device)
    job = Job(work="distill", shared=shared, version=0, clients=(0,), seed=seed)
    source = public_source(
        public if answers else _unanswered(public), batch=batch, steps=steps, pad=pad, max_length=max_length
    )
    log: list[LogLine] = []
    scheduled = _Scheduled(work, schedule, steps=steps, lr=lr, every=max(1, -(-steps // lines)), log=log.append)
    message, _ = fold(scheduled, source.batches((0,), seed), job, (0,))
    if bool(message.metrics["failed"][0]):
        raise LichenError(f"diverged within {steps} steps", where="pre_distil", fix=f"use a lower rate than {lr:g}")
    before = start.trainable
    moved = {name: before[name] + x[0].to(before[name]) for name, x in message.tensors.items()}
    return start | Shared(moved), log


@final
@dataclass(frozen=True, slots=True)
class _Scheduled:
    """Distillation of one student whose learning rate follows its steps; a line of the log every few of them."""

    inner: Distill
    schedule: Schedule
    _: KW_ONLY
    steps: int
    lr: float
    every: int
    log: Callable[[LogLine], None]

    def expected(self, job: Job) -> Expected:
        return self.inner.expected(job)

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> _ScheduledState:
        return _ScheduledState(inner=self.inner.init(job, clients, own_C))

    def step(self, state: _ScheduledState, batch: Batch) -> _ScheduledState:
        factor = lr_factor(self.schedule, state.step, self.steps)
        job = replace(state.inner.job, settings={"lr_scale": factor})
        inner, step = self.inner.step(replace(state.inner, job=job), batch), state.step + 1
        if step % self.every and step != self.steps:
            return replace(state, inner=inner, step=step)
        loss_sum, count = float(inner.sums["loss_sum"][0]), float(inner.sums["count"][0])
        mean = (loss_sum - state.loss_sum) / max(count - state.count, 1.0)
        self.log({"step": float(step), "loss": mean, "lr": self.lr * factor})
        return _ScheduledState(inner=inner, step=step, loss_sum=loss_sum, count=count)

    def final(self, state: _ScheduledState) -> tuple[Message, Tree | None]:
        return self.inner.final(state.inner)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _ScheduledState:
    """The training so far, its steps, and the sums at the last line of the log."""

    inner: Any
    step: int = 0
    loss_sum: float = 0.0
    count: float = 0.0


def _open(model: CohortModel) -> Open:
    if not isinstance(model, Open):
        raise LichenError(
            f"the inner states of {model.name} cannot be seen", where="layers", fix="use the student transformer"
        )
    return model


def _unanswered(public: Shard) -> Shard:
    return replace(public, answer=np.full(public.size, -1, np.int64))
