"""Negative preference optimization: a model around another whose rows become less likely than a reference finds them.

    L = -(2/β) log σ(-β r),  r = log π(y | x) - log π_ref(y | x)

It is the half of DPO that lowers a rejected answer, with nobody's answer to raise. Its gradient is that of -NLL times
2σ(β r): as a row gets less likely, it is pushed less, and the loss has a floor of 0, where plain gradient ascent has
none. The reference is the model before unlearning. Of a language model log π(y | x) is the sum over a row's labelled
tokens, of a classifier that of its class.

References:
    Ruiqi Zhang, Licong Lin, Yu Bai and Song Mei. "Negative Preference Optimization: From Catastrophic Collapse to
    Effective Unlearning." COLM 2024. https://arxiv.org/abs/2404.05868

Legend: C clients, B rows.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["NegativePreferenceModel", "negative_loss"]


def negative_loss(ratio: Tensor, beta: float) -> Tensor:
    """Each row's loss.

    Args:
        ratio: r of each row.
        beta: β.

    >>> [round(float(loss), 3) for loss in negative_loss(torch.tensor([-60.0, 0.0, 60.0]), 0.5)]
    [0.0, 2.773, 120.0]
    """
    return -(2 / beta) * logsigmoid(-beta * ratio)


@final
class NegativePreferenceModel:
    """A :class:`lichen.core.contracts.model.CohortModel` that unlearns rows.

    Args:
        model: One whose loss is a sum of rows' negative log-likelihoods.
        beta: β; towards 0 it is gradient ascent.

    Raises:
        LichenError: if β is not positive.
    """

    __slots__ = ("base", "beta", "classes", "group", "inner", "name", "objective", "reference")

    def __init__(self, model: CohortModel, *, beta: float = 0.1) -> None:
        if not beta > 0:
            raise LichenError(f"{beta} is not above 0", where="npo.beta", fix="use 0.1")
        self.inner, self.beta = model, beta
        self.name, self.base, self.group, self.classes = model.name, model.base, model.group, model.classes
        self.reference, self.objective = model.reference, model.objective

    def init(self, seed: int) -> Tree:
        """The model's."""
        return self.inner.init(seed)

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_C, count_C)``: summed over rows with a label, and their number; raises as :meth:`losses`."""
        loss_CB, count_CB = self.losses(trainable_C, fixed, batch)
        return torch.stack([loss_B.clone().sum() for loss_B in loss_CB]), count_CB.sum(1)

    def losses(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_CB, count_CB)``: each row's, and whether it has a label.

        Raises:
            LichenError: if nobody has scored the rows by the reference; and as the model inside.
        """
        if "reference_CB" not in batch:
            raise LichenError("rows came without the reference's scores", where="batch", fix="score them first")
        nll_CB, count_CB = self.inner.losses(trainable_C, fixed, batch)
        counted_CB = (count_CB > 0) & ((batch["index_CB"] >= 0) & batch["active_C"][:, None]).to(nll_CB.device)
        ratio_CB = -nll_CB - batch["reference_CB"].to(nll_CB)
        loss_CB = negative_loss(ratio_CB, self.beta)
        return torch.where(counted_CB, loss_CB, torch.zeros_like(loss_CB)), counted_CB.long()

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """The model's; raises as that."""
        return self.inner.logits(trainable_C, fixed, batch)
