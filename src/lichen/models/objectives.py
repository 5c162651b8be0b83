"""What a model's outputs are held against: the loss it is trained by, and the sums it is scored by.

A language model learns the next token. A model of rows gives K numbers a row, and its objective says what they should
be: :class:`Classification` takes them for logits of classes and learns from a teacher's answers too, :class:`RowLoss`
is any loss of one row.

Sums are taken client by client, so that a client's number has the same bits in any company.

Legend: C clients, B rows, R rows with a label, T tokens, K outputs of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Protocol, final

import torch
from torch import Tensor
from torch.nn import functional

from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.conventions.labels import has_label
from lichen.core.errors import LichenError
from lichen.core.expected import COUNT, LOSS, MetricSpec, sums_of
from lichen.core.tree import Tree, split
from lichen.models.losses import classify_losses_C, classify_losses_CB

__all__ = ["Classification", "LogitsLoss", "NextToken", "RowLoss", "RowObjective"]

LogitsLoss = Callable[[Tensor, Tree, Batch], tuple[Tensor, Tensor]]
"""From ``(logits_CBK, fixed, batch)`` to losses and counts, ``(C,)`` or ``(C, B)``."""


@final
@dataclass(frozen=True, slots=True)
class NextToken:
    """The summed cross entropy of a language model's labelled tokens."""

    @property
    def classes(self) -> int | None:
        """None: tokens are no classes."""
        return None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The loss and the number of labelled tokens."""
        return {"loss_sum": (), "count": ()}

    def specs(self) -> Mapping[str, MetricSpec]:
        """A cross entropy is not negative."""
        return {"loss_sum": LOSS, "count": COUNT}

    def sums(self, model: CohortModel, params_C: Tree, fixed: Tree, batch: Batch) -> Tree:
        """Those of the model's own loss, which never holds logits whole."""
        loss_C, count_C = model.loss(params_C, fixed, batch)
        return {"loss_sum": loss_C, "count": count_C}

    def made_up(self, ids_CBT: Tensor, mask_CBT: Tensor) -> Tree:
        """Labels of made-up rows: their own tokens."""
        return {"labels_CBT": torch.where(mask_CBT == 1, ids_CBT, -100)}


class RowObjective(Protocol):
    """An objective of a model that gives K numbers a row; a :class:`lichen.core.contracts.model.Objective`."""

    @property
    def classes(self) -> int | None:
        """Number of classes among which a row is told; None where outputs are no classes."""
        ...

    def losses_C(self, logits_CBK: Tensor, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_C, count_C)``: summed over the rows of active clients that teach something, and their number."""
        ...

    def losses_CB(self, logits_CBK: Tensor, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_CB, count_CB)``: the same of each row."""
        ...

    def score(self, logits_BK: Tensor, labels_B: Tensor) -> Tree:
        """The sums of one client's rows, by the names of ``shapes``."""
        ...

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As every objective's."""
        ...

    def specs(self) -> Mapping[str, MetricSpec]:
        """As every objective's."""
        ...

    def sums(self, model: CohortModel, params_C: Tree, fixed: Tree, batch: Batch) -> Tree:
        """As every objective's."""
        ...

    def made_up(self, ids_CBT: Tensor, mask_CBT: Tensor) -> Tree:
        """As every objective's."""
        ...


def _sums(objective: RowObjective, model: CohortModel, params_C: Tree, fixed: Tree, batch: Batch) -> Tree:
    logits_CBK = model.logits(params_C, fixed, batch)
    labels_CB = batch["labels_CB"].to(logits_CBK.device)
    each = [objective.score(logits_BK, y) for logits_BK, y in zip(logits_CBK.float(), labels_CB, strict=True)]
    return {name: torch.stack([one[name] for one in each]) for name in objective.shapes()}


@final
@dataclass(frozen=True, slots=True)
class Classification:
    """Cross entropy among classes, and against a teacher's answers; scored by the plain one and a confusion table.

    Attributes:
        classes: K.
    """

    classes: int

    def losses_C(self, logits_CBK: Tensor, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """As :func:`lichen.models.losses.classify_losses_C`."""
        return classify_losses_C(logits_CBK, fixed, batch)

    def losses_CB(self, logits_CBK: Tensor, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """As :func:`lichen.models.losses.classify_losses_CB`."""
        return classify_losses_CB(logits_CBK, fixed, batch)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The loss, the number of labelled rows, and ``confusion`` ``(K, K)``: (true, predicted)."""
        return {"loss_sum": (), "count": (), "confusion": (self.classes, self.classes)}

    def specs(self) -> Mapping[str, MetricSpec]:
        """A cross entropy is not negative, and neither are counts."""
        return sums_of(self.shapes(), {"loss_sum": LOSS, "confusion": replace(COUNT, high=1.0, per="count")})

    def score(self, logits_BK: Tensor, labels_B: Tensor) -> Tree:
        """The sums of one client's rows."""
        known_B = labels_B >= 0
        pair_B = labels_B[known_B] * self.classes + logits_BK[known_B].argmax(-1)
        confusion = torch.bincount(pair_B, minlength=self.classes * self.classes)
        return {
            "loss_sum": functional.cross_entropy(logits_BK, labels_B, ignore_index=-100, reduction="sum"),
            "count": known_B.sum(),
            "confusion": confusion.view(self.classes, self.classes),
        }

    def sums(self, model: CohortModel, params_C: Tree, fixed: Tree, batch: Batch) -> Tree:
        """The sums of rows with a label; padding rows, whose index is -1, have none."""
        if "index_CB" in batch:
            batch = {**batch, "labels_CB": batch["labels_CB"].masked_fill(batch["index_CB"] < 0, -100)}
        return _sums(self, model, params_C, fixed, batch)

    def made_up(self, ids_CBT: Tensor, mask_CBT: Tensor) -> Tree:
        """Labels of made-up rows: the first class."""
        del mask_CBT
        return {"labels_CB": torch.zeros(ids_CBT.shape[:2], dtype=torch.int64, device=ids_CBT.device)}


@final
@dataclass(frozen=True, slots=True)
class RowLoss:
    """Any loss of one row against its label.

    Attributes:
        loss: From ``(outputs_RK, labels_R)`` to each row's loss ``(R,)``.
        outputs: K.
        label: A label, for its shape and type: real ones are float32.
        more: Further sums that clients are scored by: each row's numbers ``(R, ...)`` by name.
        ranges: What the sums can be, by their names (``loss_sum`` and those of ``more``), as far as it is known:
            ``MetricSpec(0.0)`` where no row's number is negative. The server refuses what is out of them.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    _: KW_ONLY
    outputs: int = 1
    label: Tensor = field(default_factory=lambda: torch.zeros(()))
    more: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)
    ranges: Mapping[str, MetricSpec] = field(default_factory=dict)

    @property
    def classes(self) -> int | None:
        """None: outputs are no classes."""
        return None

    def losses_C(self, logits_CBK: Tensor, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss of rows with a label.

        Raises:
            LichenError: if rows came with a teacher's answers, which are of classes.
        """
        each, known_CB = self._each(logits_CBK, fixed, batch)
        return torch.stack([loss_R.sum() for loss_R in each]), known_CB.sum(1)

    def losses_CB(self, logits_CBK: Tensor, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of each row with a label, 0 of the others.

        Raises:
            LichenError: as :meth:`losses_C`.
        """
        each, known_CB = self._each(logits_CBK, fixed, batch)
        rows = [
            loss_R.new_zeros(known_B.shape).masked_scatter(known_B, loss_R)
            for loss_R, known_B in zip(each, known_CB, strict=True)
        ]
        return torch.stack(rows), known_CB.long()

    def _each(self, logits_CBK: Tensor, fixed: Tree, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """The losses of each client's rows with a label, and which rows those are."""
        if split(fixed, "answers.")[0]:
            raise LichenError("a loss of rows cannot learn from class answers", where="job", fix="use a classifier")
        known_CB = has_label(batch["labels_CB"]) & batch["active_C"][:, None]
        wide_CBK = logits_CBK.to(torch.promote_types(logits_CBK.dtype, torch.float32))
        rows = zip(wide_CBK, batch["labels_CB"], known_CB, strict=True)
        return [self.loss(x[known], y[known]) for x, y, known in rows], known_CB

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The loss, the number of labelled rows, and what ``more`` adds up."""
        row_1K, label_1 = torch.zeros(1, self.outputs), self.label[None]
        further = {name: tuple(each(row_1K, label_1).shape[1:]) for name, each in self.more.items()}
        return {"loss_sum": (), "count": (), **further}

    def specs(self) -> Mapping[str, MetricSpec]:
        """The ranges that were given; any finite number where none is."""
        return sums_of(self.shapes(), self.ranges)

    def score(self, logits_BK: Tensor, labels_B: Tensor) -> Tree:
        """The sums of one client's rows."""
        known_B = has_label(labels_B[None])[0]
        outputs_RK, labels_R = logits_BK[known_B], labels_B[known_B]
        further = {name: each(outputs_RK, labels_R).sum(0) for name, each in self.more.items()}
        return {"loss_sum": self.loss(outputs_RK, labels_R).sum(), "count": known_B.sum(), **further}

    def sums(self, model: CohortModel, params_C: Tree, fixed: Tree, batch: Batch) -> Tree:
        """The sums of rows with a label."""
        return _sums(self, model, params_C, fixed, batch)

    def made_up(self, ids_CBT: Tensor, mask_CBT: Tensor) -> Tree:
        """Labels of made-up rows: copies of the one that was given."""
        del mask_CBT
        return {"labels_CB": self.label.to(ids_CBT.device).expand(*ids_CBT.shape[:2], *self.label.shape).clone()}
