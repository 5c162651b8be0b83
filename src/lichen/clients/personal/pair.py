"""Two low-rank adapters side by side, a shared one and a client's own, as one of the sum of their ranks.

``A`` of the second under that of the first, ``B`` beside ``B``: the model of such tensors adds both products. How much
each counts is a constant that ``B`` takes in, or is left to the layers: a number for each row
(:data:`lichen.core.parameters.CENTER`), or a gate for each token and layer
(:mod:`lichen.models.adapters.lora`).

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.contracts.model import Batch, CohortModel, Objective
from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["OTHER", "Paired", "factors_C", "is_factor", "pair_of", "refuse_no_factors"]

OTHER = "other/"
"""Before the names of the first adapter's tensors, where both stand in one tree."""

_A, _B = "lora_A", "lora_B"


def is_factor(name: str) -> bool:
    """Whether a tensor is a factor of a low-rank adapter.

    >>> is_factor("layers.0.q_proj.lora_A"), is_factor("classifier.weight")
    (True, False)
    """
    return name.endswith((f".{_A}", f".{_B}"))


def factors_C(shared: Tree, clients: int) -> Tree:
    """The shared adapter beside so many clients' own, read and never written."""
    return trees.expand({name: x for name, x in shared.items() if is_factor(name)}, clients)


def refuse_no_factors(names: Iterable[str]) -> None:
    """Nothing, where what is trained has low-rank adapters.

    Raises:
        LichenError: else.
    """
    if not any(map(is_factor, names)):
        what = "a shared and an own adapter stand side by side, which low-rank ones can, and none is trained"
        raise LichenError(what, where="personal.kind", fix="use model.adapter.kind: lora, or another kind")


def pair_of(first_C: Tree, second_C: Tree, *, second: float | None = None) -> Tree:
    """One model of both adapters; what is no adapter, such as a head, and gates are the second's.

    Args:
        first_C: Factors of the first, ``(C, r, in)`` and ``(C, out, r)``.
        second_C: All tensors of the second, and gates.
        second: How much it counts, the first the rest; None: that is the layers' to say.
    """
    weights = (1.0, 1.0) if second is None else (1.0 - second, second)
    pair_C = dict(second_C)
    for name, one_C in first_C.items():
        two_C = second_C[name].to(one_C)
        if name.endswith(_A):
            pair_C[name] = torch.cat([one_C, two_C], dim=1)
        else:
            pair_C[name] = torch.cat([one_C * weights[0], two_C * weights[1]], dim=2)
    return pair_C


@final
class Paired:
    """A model whose clients have the tensors at :data:`OTHER` beside their own; a model of cohorts like any other.

    Args:
        model: Computes; its name, its groups and its bits are this one's.
        second: As of :func:`pair_of`.
    """

    __slots__ = ("base", "classes", "group", "model", "name", "reference", "second")

    def __init__(self, model: CohortModel, second: float | None) -> None:
        self.model, self.second = model, second
        self.name, self.base, self.group = model.name, model.base, model.group
        self.classes, self.reference = model.classes, model.reference

    @property
    def objective(self) -> Objective:
        """The model's."""
        return self.model.objective

    def init(self, seed: int) -> Tree:
        """The model's start: the second adapter's, and the first's as well."""
        return self.model.init(seed)

    def _pair(self, trainable_C: Tree) -> Tree:
        first_C, second_C = trees.split(trainable_C, OTHER)
        return pair_of(first_C, second_C, second=self.second)

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """The pair's, as the model's; raises as that."""
        return self.model.loss(self._pair(trainable_C), fixed, batch)

    def losses(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """The pair's of each row; raises as the model's."""
        return self.model.losses(self._pair(trainable_C), fixed, batch)

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """The pair's; raises as the model's."""
        return self.model.logits(self._pair(trainable_C), fixed, batch)
