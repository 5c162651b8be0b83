"""Losses of classifiers, summed over one client's rows or of each row, the same bits whatever the other clients are.

torch splits a reduction by the shape of the whole tensor; every sum here is therefore taken on one
client's slice.

A teacher's answers lie in ``answers.prob`` and ``answers.index``: all K classes, the top k, or one label.
How they are learned from is told by numbers beside them (:func:`answer_settings`):

======================= ==================================================================
``answers.temperature``  T: both sides are softened, and the loss is multiplied by T², so that
                         its gradient keeps its size against the labels'
``answers.weight``       of a row's answer, where a label weighs 1
``answers.threshold``    rows whose likeliest class is less likely than this teach nothing
``answers.hard``         not 0: only the likeliest class teaches, weighed by its probability
======================= ==================================================================

Cross entropy against the answers is their Kullback-Leibler divergence from the student but for a
constant, the answers' own entropy: the gradients are the same.

References:
    Geoffrey Hinton, Oriol Vinyals and Jeff Dean. "Distilling the Knowledge in a Neural Network." NIPS
    Deep Learning Workshop 2014. https://arxiv.org/abs/1503.02531

Legend: C clients, B rows, K classes, N rows of the shared answers, k answers kept of each row, R rows with an answer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["answer_settings", "classify_losses_C", "classify_losses_CB", "distill_loss", "soft_loss"]

_SETTINGS = ("answers.temperature", "answers.weight", "answers.threshold", "answers.hard")


def _wide(x: Tensor) -> Tensor:
    """At least single precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def answer_settings(
    *,
    temperature: float | None = None,
    weight: float | None = None,
    threshold: float | None = None,
    hard: bool | None = None,
) -> Tree:
    """How a teacher's answers are learned from, as scalars beside them; what is None is left out.

    Args:
        temperature: T > 0; 1 takes the answers as they are.
        weight: Of a row's answer against a label's 1; 0 or more.
        threshold: Least probability of the likeliest class, from 0 to 1.
        hard: Only the likeliest class teaches, weighed by its probability.

    Raises:
        LichenError: if a number is out of range.

    >>> {name: float(x) for name, x in answer_settings(temperature=2.0, hard=True).items()}
    {'answers.temperature': 2.0, 'answers.hard': 1.0}
    """
    settings = {
        "temperature": (temperature, temperature is None or 0 < temperature < math.inf, "a number > 0, such as 2"),
        "weight": (weight, weight is None or 0 <= weight < math.inf, "a number >= 0"),
        "threshold": (threshold, threshold is None or 0 <= threshold <= 1, "a number from 0 to 1"),
        "hard": (hard, hard in (None, True, False), "true or false"),
    }
    for name, (value, fits, fix) in settings.items():
        if not fits:
            raise LichenError(f"{value} is out of range", where=f"answers.{name}", fix=f"use {fix}")
    return {f"answers.{name}": torch.tensor(float(x)) for name, (x, _, _) in settings.items() if x is not None}


def _targets(prob_Rk: Tensor, index_Rk: Tensor, classes: int) -> Tensor:
    """Whole distributions ``(R, K)``: what the kept answers leave is spread evenly on the other classes."""
    if bool((index_Rk < 0).any()):
        # Answers that name no class are none: one more column takes them, and is cut off.
        known_Rk = index_Rk >= 0
        prob_Rk = torch.where(known_Rk, prob_Rk, torch.zeros_like(prob_Rk))
        others_R1 = (classes - known_Rk.sum(1, keepdim=True)).clamp(min=1)
        left_R1 = (1 - prob_Rk.sum(1, keepdim=True)).clamp(min=0) / others_R1
        spread_RK = left_R1.expand(-1, classes + 1).contiguous()
        return spread_RK.scatter(1, torch.where(known_Rk, index_Rk, classes), prob_Rk)[:, :classes]
    others = classes - index_Rk.shape[1]
    left_R1 = (1 - prob_Rk.sum(1, keepdim=True)).clamp(min=0) / max(others, 1)
    spread_RK = left_R1.expand(-1, classes).contiguous()
    return spread_RK.scatter(1, index_Rk, prob_Rk)


def soft_loss(logits_BK: Tensor, answer_B: Tensor, prob_Nk: Tensor, index_Nk: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy against a teacher's top answers, summed over the rows that have one.

    What the kept answers leave of the probability is spread evenly on the other classes. An answer that
    names no known class (index -1) is none; a row with no other teaches nothing.

    Args:
        logits_BK: The student's logits.
        answer_B: Row of the shared answers, -1 where there is none.
        prob_Nk: The teacher's probabilities.
        index_Nk: The classes they belong to.

    Returns:
        ``(loss, count)``: the sum and the number of rows in it.
    """
    target_RK, log_RK, chosen_B = _soft_rows(logits_BK, answer_B, prob_Nk, index_Nk)
    return -(target_RK * log_RK).sum(), chosen_B.sum()


def _soft_rows(logits_BK: Tensor, answer_B: Tensor, prob_Nk: Tensor, index_Nk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(target_RK, log_RK, chosen_B)``: what the answers say, what the student says, and the rows with an answer."""
    chosen_B = _answered(answer_B, index_Nk)
    rows_R = answer_B[chosen_B]
    log_RK = nn.functional.log_softmax(_wide(logits_BK[chosen_B]), dim=-1)
    index_Rk, prob_Rk = index_Nk[rows_R].long(), prob_Nk[rows_R].to(log_RK.dtype)
    return _targets(prob_Rk, index_Rk, log_RK.shape[1]), log_RK, chosen_B


def _answered(answer_B: Tensor, index_Nk: Tensor) -> Tensor:
    """Rows with an answer that names a class."""
    chosen_B = answer_B >= 0
    return chosen_B & (index_Nk[answer_B.clamp(min=0)] >= 0).any(1)


def distill_loss(logits_BK: Tensor, answer_B: Tensor, fixed: Tree) -> tuple[Tensor, Tensor]:
    """:func:`soft_loss` under the settings that came down with the answers; the same bits where none did.

    Args:
        logits_BK: The student's logits.
        answer_B: Row of the shared answers, -1 where there is none.
        fixed: ``answers.prob`` and ``answers.index`` ``(N, k)``, and any of :func:`answer_settings`.

    Returns:
        ``(loss, count)``: the sum and the number of rows in it.
    """
    prob_Nk, index_Nk = fixed["answers.prob"], fixed["answers.index"]
    if not any(name in fixed for name in _SETTINGS):
        return soft_loss(logits_BK, answer_B, prob_Nk, index_Nk)
    loss_R, sure_R, weight, _ = _distill_rows(logits_BK, answer_B, fixed)
    return weight * loss_R.sum(), sure_R.sum()


def distill_losses(logits_BK: Tensor, answer_B: Tensor, fixed: Tree) -> tuple[Tensor, Tensor]:
    """``(loss_B, count_B)``: the same of each row; 0 where it has no answer, or none that is sure enough."""
    if any(name in fixed for name in _SETTINGS):
        loss_R, sure_R, weight, chosen_B = _distill_rows(logits_BK, answer_B, fixed)
        loss_R = weight * loss_R
    else:
        prob_Nk, index_Nk = fixed["answers.prob"], fixed["answers.index"]
        target_RK, log_RK, chosen_B = _soft_rows(logits_BK, answer_B, prob_Nk, index_Nk)
        loss_R, sure_R = -(target_RK * log_RK).sum(1), torch.ones_like(log_RK[:, 0], dtype=torch.bool)
    nothing_B = loss_R.new_zeros(chosen_B.shape)
    return nothing_B.masked_scatter(chosen_B, loss_R), nothing_B.long().masked_scatter(chosen_B, sure_R.long())


def _distill_rows(logits_BK: Tensor, answer_B: Tensor, fixed: Tree) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(loss_R, sure_R, weight, chosen_B)``: 0 where an answer is not sure enough; the weight is yet to be applied."""
    prob_Nk, index_Nk = fixed["answers.prob"], fixed["answers.index"]
    chosen_B = _answered(answer_B, index_Nk)
    rows_R = answer_B[chosen_B]
    wide_RK = _wide(logits_BK[chosen_B])
    target_RK = _targets(prob_Nk[rows_R].to(wide_RK.dtype), index_Nk[rows_R].long(), wide_RK.shape[1])
    top_R, class_R = target_RK.max(1)
    if fixed.get("answers.hard", torch.zeros(())) != 0:
        loss_R = top_R * nn.functional.cross_entropy(wide_RK, class_R, reduction="none")
    else:
        warm = fixed.get("answers.temperature", torch.ones(())).to(wide_RK)
        soft_RK = (target_RK.log() / warm).softmax(-1)
        loss_R = -(soft_RK * nn.functional.log_softmax(wide_RK / warm, dim=-1)).sum(1) * warm.square()
    sure_R = top_R >= fixed.get("answers.threshold", torch.zeros(())).to(top_R)
    weight = fixed.get("answers.weight", torch.ones(())).to(loss_R)
    return torch.where(sure_R, loss_R, torch.zeros_like(loss_R)), sure_R, weight, chosen_B


def classify_losses_C(logits_CBK: Tensor, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
    """``(loss_C, count_C)`` of a classifier: labelled rows, and rows with a teacher's answer.

    Raises:
        LichenError: if a label or an answer lies outside its range, or answers are asked for but not there.
    """
    losses, counts = [], []
    labels_CB, answer_CB = _checked(logits_CBK, fixed, batch)
    for c, logits_BK in enumerate(logits_CBK.unbind(0)):
        # An empty sum: zero, yet part of the graph, for a client with nothing to learn from.
        loss, count = _wide(logits_BK[:0]).sum(), torch.zeros((), dtype=torch.int64, device=logits_BK.device)
        if bool(batch["active_C"][c]):
            if labels_CB is not None:
                loss = loss + nn.functional.cross_entropy(
                    _wide(logits_BK), labels_CB[c], ignore_index=-100, reduction="sum"
                )
                count = count + (labels_CB[c] != -100).sum()
            if answer_CB is not None:
                more, rows = distill_loss(logits_BK, answer_CB[c], fixed)
                loss, count = loss + more, count + rows
        losses.append(loss)
        counts.append(count)
    return torch.stack(losses), torch.stack(counts)


def classify_losses_CB(logits_CBK: Tensor, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
    """``(loss_CB, count_CB)``: what :func:`classify_losses_C` sums, of each row; a label and an answer count as two.

    Raises:
        LichenError: as :func:`classify_losses_C`.
    """
    labels_CB, answer_CB = _checked(logits_CBK, fixed, batch)
    active_C1 = batch["active_C"][:, None]
    logits_CBK = torch.where(active_C1[..., None], logits_CBK, torch.zeros_like(logits_CBK))
    # Zeros, yet part of the graph.
    loss_CB = _wide(logits_CBK[..., :0]).sum(-1)
    count_CB = torch.zeros(loss_CB.shape, dtype=torch.int64, device=loss_CB.device)
    if labels_CB is not None:
        flat = nn.functional.cross_entropy(
            _wide(logits_CBK).flatten(0, 1), labels_CB.flatten(), ignore_index=-100, reduction="none"
        )
        loss_CB, count_CB = loss_CB + flat.view_as(loss_CB), count_CB + (labels_CB != -100)
    if answer_CB is not None:
        pairs = [distill_losses(x, answer_B, fixed) for x, answer_B in zip(logits_CBK, answer_CB, strict=True)]
        loss_CB = loss_CB + torch.stack([loss_B for loss_B, _ in pairs])
        count_CB = count_CB + torch.stack([count_B for _, count_B in pairs])
    return torch.where(active_C1, loss_CB, torch.zeros_like(loss_CB)), count_CB * active_C1


def _checked(logits_CBK: Tensor, fixed: Tree, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
    """The batch's labels, and its answers where a row has one."""
    labels_CB, answer_CB = batch.get("labels_CB"), batch.get("answer_CB")
    classes = logits_CBK.shape[-1]
    if labels_CB is not None and bool(((labels_CB >= classes) | ((labels_CB < 0) & (labels_CB != -100))).any()):
        raise LichenError(f"a label lies outside 0..{classes - 1}", where="data", fix="check the model's classes")
    soft = answer_CB is not None and bool((answer_CB >= 0).any())
    if soft and not ("answers.prob" in fixed and "answers.index" in fixed):
        raise LichenError("rows name a teacher's answers, but none came down", where="job")
    return labels_CB, answer_CB if soft else None
