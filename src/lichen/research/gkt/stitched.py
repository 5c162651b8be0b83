"""A split network: a small feature extractor at the client, a large head at the server.

Research: no recipe and no public name reaches this module.

The small part has a classifier of its own, so that it can be trained, and can speak, without the large
one; together the small part's features go through the large part. So a weak client can train its half
while the server trains the other (split learning without sending gradients, as FedGKT does).

References:
    Chaoyang He, Murali Annavaram and Salman Avestimehr. "Group Knowledge Transfer: Federated Learning of
    Large CNNs at the Edge." NeurIPS 2020. https://arxiv.org/abs/2007.14513

Legend: C clients, B rows, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.tree import Tree, join, split, to_device
from lichen.models.client_axis import map_clients, row_by_row
from lichen.models.cohort import group_of
from lichen.models.students.student import Student, linear, with_bias

__all__ = ["Stem", "Stitched"]


@final
class Stem(Student):
    """Fully connected layers with ReLU that end in F features, and a linear classifier on them.

    Args:
        features: Numbers of one row.
        widths: Of the layers; the last is F.
        classes: K.
        name: Name in groups and messages.
        reference: As in :class:`lichen.models.students.student.Student`.
    """

    inputs = ("x_CBF",)

    def __init__(
        self,
        features: int,
        *,
        widths: Sequence[int] = (16,),
        classes: int,
        name: str = "stem",
        reference: bool = True,
    ) -> None:
        if not widths:
            raise LichenError("a stem without a layer", where="widths", fix="give at least one width")
        self._widths, self._classes = (features, *widths), classes
        super().__init__(classes, name=name, reference=reference)

    @property
    def width(self) -> int:
        """F."""
        return self._widths[-1]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the parameters."""
        pairs = zip(self._widths, self._widths[1:], strict=False)
        layers = {f"layer{i}": (out, inside) for i, (inside, out) in enumerate(pairs)}
        return with_bias({**layers, "head": (self._classes, self.width)})

    def apply(self, params: Tree, *inputs: Tensor) -> Tensor:
        """Logits (B, K) of rows (B, ...)."""
        return linear(params, "head", self.extract(params, inputs[0]))

    def extract(self, params: Tree, x: Tensor) -> Tensor:
        """Features (B, F) of rows (B, ...)."""
        x = x.flatten(1)
        for i in range(len(self._widths) - 1):
            x = torch.relu(linear(params, f"layer{i}", x))
        return x

    def features(self, params_C: Tree, batch: Batch) -> Tensor:
        """``features_CBF`` of a cohort's batch, a client at a time."""
        batch = to_device(batch, next(iter(params_C.values())).device)
        rows_C = batch["x_CBF"]
        return torch.stack(
            [self.extract({name: x[c] for name, x in params_C.items()}, rows) for c, rows in enumerate(rows_C)]
        )


@final
class Stitched:
    """A stem under a top; a :class:`lichen.core.contracts.model.CohortModel` whose top's tensors lie under ``top/``.

    Args:
        stem: The small part.
        top: A student that takes the stem's F features as rows.
    """

    __slots__ = ("base", "classes", "group", "name", "objective", "reference", "stem", "top")

    def __init__(self, stem: Stem, top: Student) -> None:
        if stem.classes != top.classes:
            raise LichenError(
                f"the parts tell {stem.classes} and {top.classes} classes", where="model", fix="use the same classes"
            )
        self.stem, self.top = stem, top
        self.name, self.base, self.classes = f"{stem.name}+{top.name}", "", stem.classes
        self.reference, self.objective = stem.reference, stem.objective
        self.group = group_of(self.name, self.init(0))

    def init(self, seed: int) -> Tree:
        """Both parts' first tensors."""
        return join("top/", self.top.init(seed), self.stem.init(seed))

    def _logits(self, params_C: Tree, batch: Batch) -> tuple[Tensor, ...]:
        top_C, stem_C = split(params_C, "top/")
        above = {"active_C": batch["active_C"], "x_CBF": self.stem.features(stem_C, batch)}
        return (self.top.logits(top_C, {}, above),)

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_C, count_C)`` through both parts, as every student's."""

        def losses(part_C: Tree, part: Batch) -> tuple[Tensor, ...]:
            return self.objective.losses_C(self._logits(part_C, part)[0], fixed, part)

        batch = to_device(batch, next(iter(trainable_C.values())).device)
        loss_C, count_C = map_clients(losses, trainable_C, batch, reference=self.reference)
        return loss_C, count_C

    def losses(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_CB, count_CB)``, one row at a time."""
        return row_by_row(self.loss, trainable_C, fixed, batch)

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """``logits_CBK`` through both parts."""
        batch = to_device(batch, next(iter(trainable_C.values())).device)
        return map_clients(self._logits, trainable_C, batch, reference=self.reference)[0]
