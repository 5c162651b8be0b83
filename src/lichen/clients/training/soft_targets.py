"""Adds soft targets for unlabelled rows to the loss of labelled ones.

A work that finds out in a step what a row should say puts it into the batch as ``target_CBK``: a row of
probabilities times how much the row shall weigh, zeros where there is no target. This model adds their
cross entropy; it is what lets such a work go around :class:`lichen.clients.training.train.Train` without copying it.

Legend: C clients, B rows, K classes, R rows with a target.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.tree import Tree, to_device
from lichen.models.losses import classify_losses_C

__all__ = ["TargetLoss", "pseudo_labels_CB"]


@final
class TargetLoss:
    """A classifier whose batches may also hold ``target_CBK``: what rows without a label shall say, and how much.

    The loss of a client with targets is such that the mean training takes is the mean over labelled
    rows plus the sum of the targets' cross entropies. Without targets it is the model's own, bit for bit.
    With ``partner_CB`` a row's logits are first mixed with those of another: ``share_CB`` of its own, the rest of
    the partner's.

    Args:
        model: A classifier.
    """

    __slots__ = ("base", "classes", "group", "inner", "name", "objective", "reference")

    def __init__(self, model: CohortModel) -> None:
        self.inner = model
        self.name, self.base, self.group = model.name, model.base, model.group
        self.classes, self.reference, self.objective = model.classes, model.reference, model.objective

    def init(self, seed: int) -> Tree:
        """The model's."""
        return self.inner.init(seed)

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """The model's."""
        return self.inner.logits(trainable_C, fixed, batch)

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_C, count_C)``; rows with a target count as labelled, those made by mixing do not."""
        if "target_CBK" not in batch:
            return self.inner.loss(trainable_C, fixed, batch)
        logits_CBK = self.inner.logits(trainable_C, fixed, batch)
        on = to_device(batch, logits_CBK.device)
        if "partner_CB" in batch:
            share_CB1, partner_CBK = on["share_CB"].unsqueeze(-1), on["partner_CB"].unsqueeze(-1).expand_as(logits_CBK)
            logits_CBK = share_CB1 * logits_CBK + (1 - share_CB1) * logits_CBK.gather(1, partner_CBK)
        loss_C, count_C = classify_losses_C(logits_CBK, fixed, on)
        own_CB = on["index_CB"] >= 0
        losses, counts = [], []
        for c, (loss, count) in enumerate(zip(loss_C, count_C, strict=True)):
            aimed_B = on["target_CBK"][c].sum(-1) > 0
            if bool(on["active_C"][c]) and bool(aimed_B.any()):
                target_RK = on["target_CBK"][c][aimed_B]
                log_RK = logits_CBK[c][aimed_B].to(target_RK.dtype).log_softmax(-1)
                learned = count + (aimed_B & own_CB[c]).sum()
                loss, count = learned * (loss / count.clamp(min=1) - (target_RK * log_RK).sum()), learned
            losses.append(loss)
            counts.append(count)
        return torch.stack(losses), torch.stack(counts)

    def losses(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """The model's own, of each row.

        Raises:
            LichenError: if there are targets: their loss is no sum over rows.
        """
        if "target_CBK" in batch:
            raise LichenError("a loss with soft targets is no sum over rows", where="batch", fix="ask for its loss")
        return self.inner.losses(trainable_C, fixed, batch)


def pseudo_labels_CB(model: CohortModel, params_C: Tree, fixed: Tree, weak: Batch) -> tuple[Tensor, Tensor]:
    """``(chance_CB, label_CB)`` on the host: the likeliest class of each row by a model, without a gradient."""
    with torch.no_grad():
        pairs = [x_BK.float().softmax(-1).max(-1) for x_BK in model.logits(params_C, fixed, weak)]
    chance_CB, label_CB = (torch.stack(x).cpu() for x in zip(*pairs, strict=True))
    return chance_CB, label_CB
