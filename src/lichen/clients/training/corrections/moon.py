"""MOON: what a client's model makes of a row is held near what the shared one makes of it, and off what its last did.

    mean over labelled rows of  CE + μ ℓ,    ℓ = - log( e^{s / τ} / (e^{s / τ} + e^{o / τ}) ),
    s = cos(z, z_shared),    o = cos(z, z_own)

with z what enters the last layer of the model as it is now, z_shared of the shared one that came down, and z_own of
the model that the client had made when it trained last, which is its private state. A client that trains for the
first time has none, and the shared one stands for it: ℓ then is log 2, whatever z. The paper adds a projection head to
its networks; here z is what the network's own last layer reads, as in the paper's ablation without one.

References:
    Qinbin Li, Bingsheng He and Dawn Song. "Model-Contrastive Federated Learning." CVPR 2021.
    https://arxiv.org/abs/2103.16257

Legend: C clients, B rows, H numbers of a representation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.clients.training.train import Train, TrainState
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.conventions.labels import has_label
from lichen.core.errors import LichenError
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.core.wrapping import innermost
from lichen.models.students.student import Student

__all__ = ["Moon"]

_OWN = "moon/"
_NEAR, _FAR = "near_CBH", "far_CBH"


@final
class ContrastLoss:
    """A small classifier whose loss also holds what enters its last layer against two others', where a batch has them.

    Args:
        model: A student.
        weight: μ.
        temperature: τ.
    """

    __slots__ = ("base", "classes", "group", "inner", "name", "objective", "reference", "temperature", "weight")

    def __init__(self, model: Student, *, weight: float, temperature: float) -> None:
        self.inner, self.weight, self.temperature = model, weight, temperature
        self.name, self.base, self.group = model.name, model.base, model.group
        self.classes, self.reference, self.objective = model.classes, model.reference, model.objective

    def init(self, seed: int) -> Tree:
        """The model's."""
        return self.inner.init(seed)

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """The model's."""
        return self.inner.logits(trainable_C, fixed, batch)

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_C, count_C)``: the model's, and μ ℓ of each labelled row."""
        plain, rest = self._split(batch)
        loss_C, count_C = self.inner.loss(trainable_C, fixed, plain)
        return loss_C + self._contrast_CB(trainable_C, plain, rest).sum(1).to(loss_C), count_C

    def losses(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_CB, count_CB)``: the same of each row."""
        plain, rest = self._split(batch)
        loss_CB, count_CB = self.inner.losses(trainable_C, fixed, plain)
        return loss_CB + self._contrast_CB(trainable_C, plain, rest).to(loss_CB), count_CB

    def _split(self, batch: Batch) -> tuple[Batch, tuple[Tensor, Tensor]]:
        return {name: x for name, x in batch.items() if name not in (_NEAR, _FAR)}, (batch[_NEAR], batch[_FAR])

    def _contrast_CB(self, trainable_C: Tree, batch: Batch, others: tuple[Tensor, Tensor]) -> Tensor:
        z_CBH = unit(self.inner.features(trainable_C, batch))
        near_CB, far_CB = ((z_CBH * other.to(z_CBH)).sum(-1) / self.temperature for other in others)
        labelled_CB = has_label(batch["labels_CB"]).to(z_CBH.device)
        return self.weight * torch.nn.functional.softplus(far_CB - near_CB) * labelled_CB


def unit(x: Tensor) -> Tensor:
    """Vectors of length one; those of length zero stay so."""
    return torch.nn.functional.normalize(x, dim=-1)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MoonState:
    """The wrapped state, and the models that clients had made when they trained last."""

    inner: TrainState
    before_C: Tree


@final
@dataclass(frozen=True, slots=True)
class Moon:
    """Training with MOON's contrast; a :class:`lichen.core.contracts.client.ClientWork`.

    Args:
        inner: The training without it.
        weight: μ; the paper tries 0.1 to 10.
        temperature: τ.

    Raises:
        LichenError: if a value is out of range, or the model is no small one.
    """

    inner: Train
    _: KW_ONLY
    weight: float = 1.0
    temperature: float = 0.5

    def __post_init__(self) -> None:
        for value, key in ((self.weight, "contrast"), (self.temperature, "temperature")):
            if not (math.isfinite(value) and value > 0):
                raise LichenError(f"{value} is not positive", where=f"optimizer.{key}", fix="use 1.0, or 0.5")
        student(self.inner.model)

    def expected(self, job: Job) -> Expected:
        """The wrapped work's."""
        return self.inner.expected(job)

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> MoonState:
        """The wrapped work's beginning, and each client's model of its last training.

        Raises:
            LichenError: if what was kept is of another model.
        """
        before_C, own = trees.split(own_C or {}, _OWN)
        inner = self.inner.init(job, clients, own or None)
        if before_C:
            trees.check_same(before_C, inner.shared_C, where="private state")
        return MoonState(inner=inner, before_C=before_C or inner.shared_C)

    def step(self, state: MoonState, batch: Batch) -> MoonState:
        """The wrapped step, with the representations that the shared model and the client's last one give."""
        model = student(self.inner.model)
        with torch.no_grad():
            near, far = (unit(model.features(params_C, batch)) for params_C in (state.inner.shared_C, state.before_C))
        contrast = ContrastLoss(model, weight=self.weight, temperature=self.temperature)
        stepped = replace(self.inner, model=contrast).step(state.inner, {**batch, _NEAR: near, _FAR: far})
        return replace(state, inner=stepped)

    def final(self, state: MoonState) -> tuple[Message, Tree | None]:
        """The wrapped work's message; the model as it is now is kept, but by a client without a step or a number."""
        message, own_C = self.inner.final(state.inner)
        moved_C = (message.metrics["failed"] == 0) & (state.inner.sums["steps"].to(message.metrics["failed"]) > 0)

        def newer(now_C: Tensor, before_C: Tensor) -> Tensor:
            return torch.where(moved_C.to(now_C.device).view(-1, *[1] * (now_C.dim() - 1)), now_C, before_C)

        after_C = trees.map_tree(newer, state.inner.params_C, state.before_C)
        return message, trees.join(_OWN, after_C, own_C or {})


def student(model: CohortModel) -> Student:
    """The small model that this is.

    Raises:
        LichenError: if it is a foundation model, of which no representation is read here.
    """
    inner = innermost(model)
    if not isinstance(inner, Student):
        what = "moon holds what enters the last layer of a small model against others'"
        raise LichenError(what, where="optimizer.name", fix="set model.student, or use sgd with prox")
    return inner
