"""The base of small models trained from scratch: initial values, client axis, loss.

A student is written for ONE client as a pure function of its parameters; stacked, ``torch.func.vmap``
carries it over the client axis, and in reference mode every client is its own call. Both give the
same numbers up to rounding; only the second gives the same bits in any company, because a batched
matrix product picks another kernel for one matrix than for eight.

Legend: C clients, B rows, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree, to_device
from lichen.core.wrapping import innermost
from lichen.models.client_axis import map_clients
from lichen.models.cohort import group_of
from lichen.models.objectives import Classification, LogitsLoss, RowObjective

__all__ = ["Student", "linear", "row_shape_of", "with_bias"]


class Student(ABC):
    """What all students share; with ``shapes`` and ``apply`` it is a :class:`lichen.core.contracts.model.CohortModel`.

    Args:
        classes: K, at least 2 where outputs are logits of classes.
        name: Name in groups and messages.
        reference: One call a client (equal bits in any company) or ``vmap`` over them.
        objective: What its outputs are held against; None: they are logits of classes.
    """

    inputs: tuple[str, ...]
    """Names of the batch's tensors that ``apply`` takes."""

    row_shape: tuple[int, ...] = ()
    """Numbers of a row, for pictures channels first; none for texts."""

    def __init__(
        self, classes: int, *, name: str, reference: bool = True, objective: RowObjective | None = None
    ) -> None:
        if classes < 2 and objective is None:
            raise LichenError(f"{classes} classes", where="classes", fix="a classifier needs at least 2")
        self.name, self.base, self.reference = name, "", reference
        self.objective: RowObjective = objective or Classification(classes)
        self.classes = self.objective.classes
        self.group = group_of(name, self.init(0))

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the parameters: ``*.weight`` is (out, in), ``*.embed`` a table, ``*.scale`` starts at one."""

    @abstractmethod
    def apply(self, params: Tree, *inputs: Tensor) -> Tensor:
        """Logits (B, K) of one client's rows."""

    def init(self, seed: int) -> Tree:
        """Weights uniform in ±1/sqrt(in), embeddings normal with deviation 0.1, scales one, biases zero."""
        tree: Tree = {}
        for name, shape in self.shapes().items():
            generator = torch_generator(seed, "student", name)
            if name.endswith("weight"):
                tree[name] = (2 * torch.rand(shape, generator=generator) - 1) / shape[1] ** 0.5
            elif name.endswith("embed"):
                tree[name] = 0.1 * torch.randn(shape, generator=generator)
            else:
                tree[name] = torch.full(shape, 1.0 if name.endswith("scale") else 0.0)
        return tree

    def _logits(self, params_C: Tree, batch: Batch) -> tuple[Tensor, ...]:
        inputs = tuple(batch[name] for name in self.inputs)
        if inputs[0].shape[0] == 1:
            return (self.apply({name: x[0] for name, x in params_C.items()}, *(x[0] for x in inputs))[None],)
        return (torch.func.vmap(self.apply)(params_C, *inputs),)

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_C, count_C)``: summed cross entropy over labelled rows and rows with a teacher's answer.

        Raises:
            LichenError: if a label lies outside the classes, or answers are named but not there.
        """

        return self._against(self.objective.losses_C, trainable_C, fixed, batch)

    def losses(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_CB, count_CB)``: the same of each row; raises as :meth:`loss`."""
        return self._against(self.objective.losses_CB, trainable_C, fixed, batch)

    def _against(self, objective: LogitsLoss, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        def losses(part_C: Tree, part: Batch) -> tuple[Tensor, ...]:
            return objective(self._logits(part_C, part)[0], fixed, part)

        batch = to_device(batch, next(iter(trainable_C.values())).device)
        loss, count = map_clients(losses, trainable_C, batch, reference=self.reference)
        return loss, count

    @property
    def head(self) -> str:
        """The layer that gives the outputs: the last of :meth:`shapes`."""
        return [name for name in self.shapes() if name.endswith(".weight")][-1].removesuffix(".weight")

    def features(self, trainable_C: Tree, batch: Batch) -> Tensor:
        """``(C, B, H)``: what enters the last layer."""
        weight_CKH = trainable_C[f"{self.head}.weight"]
        clients, _, width = weight_CKH.shape
        eye_CHH = torch.eye(width, dtype=weight_CKH.dtype, device=weight_CKH.device).expand(clients, width, width)
        through = {f"{self.head}.weight": eye_CHH, f"{self.head}.bias": weight_CKH.new_zeros(clients, width)}
        return self.logits({**trainable_C, **through}, {}, batch)

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """``logits_CBK``."""
        batch = to_device(batch, next(iter(trainable_C.values())).device)
        return map_clients(self._logits, trainable_C, batch, reference=self.reference)[0]


def row_shape_of(model: CohortModel) -> tuple[int, ...]:
    """Numbers of a row that a student reads; none for texts, and for other models."""
    inner = innermost(model)
    return inner.row_shape if isinstance(inner, Student) else ()


def linear(params: Tree, name: str, x: Tensor) -> Tensor:
    """``x W' + b`` with the parameters called ``name``."""
    return x @ params[f"{name}.weight"].t() + params[f"{name}.bias"]


def with_bias(weights: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """Shapes of linear layers, (out, in) each, with their biases."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (out, inside) in weights.items():
        shapes |= {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}
    return shapes
