"""Losses as sums over one client's rows, with the same bits whatever the other clients are.

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

Legend: C clients, B rows, K classes, N rows of the shared answers, k answers kept of each row, V
vocabulary, R rows with a label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lichen.core.contracts import Batch
from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["answer_settings", "classify_losses_C", "distill_loss", "linear_loss_C", "soft_loss", "token_loss"]

_SETTINGS = ("answers.temperature", "answers.weight", "answers.threshold", "answers.hard")


def _wide(x: Tensor) -> Tensor:
    """At least single precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_loss(head: Callable[[Tensor], Tensor], hidden_RH: Tensor, label_R: Tensor, *, chunk: int = 1024) -> Tensor:
    """Summed cross entropy of ``head(hidden)``, a scalar in float32 or wider.

    Logits are never held whole: past ``chunk`` rows each chunk's logits are made again on the way back.
    """

    def part(hidden: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(_wide(head(hidden)), label, reduction="sum")

    rows = label_R.shape[0]
    if rows == 0:
        return _wide(hidden_RH).sum()
    if rows <= chunk:
        return part(hidden_RH, label_R)
    total = _wide(hidden_RH[:0]).sum()
    for hidden, label in zip(torch.split(hidden_RH, chunk), torch.split(label_R, chunk), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(part, hidden, label, use_reentrant=False)
        else:
            total = total + part(hidden, label)
    return total


LOGITS_BYTES = 1 << 25
"""Of one chunk of logits on a CPU, thirty-two times as many on an accelerator."""


def linear_loss_C(
    hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, label_R: Tensor, counts: Sequence[int]
) -> Tensor:
    """``(C,)``: each client's summed cross entropy under a frozen output layer.

    The gradient of the hidden states is made on the way forward, chunk by chunk, so that logits are
    computed once and never held whole (Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM
    Training", 2024, arXiv:2410.10989).

    Args:
        hidden_RH: Hidden states of the labelled places, sorted by client.
        weight_VH: The output layer, which gets no gradient.
        bias_V: Its bias.
        label_R: Labels.
        counts: Labelled places of each client.
    """
    loss_C: Tensor = _LinearLoss.apply(hidden_RH, weight_VH, bias_V, label_R, counts)  # type: ignore[no-untyped-call]
    return loss_C


@final
class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        label_R: Tensor,
        counts: Sequence[int],
    ) -> Tensor:
        budget = LOGITS_BYTES * (32 if hidden_RH.is_cuda else 1)
        chunk = max(1, budget // (4 * weight_VH.shape[0]))
        loss_R = torch.empty(label_R.shape, dtype=_wide(hidden_RH[:0]).dtype, device=label_R.device)
        dhidden_RH = torch.empty_like(hidden_RH) if ctx.needs_input_grad[0] else None
        for a in range(0, label_R.shape[0], chunk):
            part, label_r1 = slice(a, a + chunk), label_R[a : a + chunk, None]
            log_rV = torch.log_softmax(_wide(nn.functional.linear(hidden_RH[part], weight_VH, bias_V)), dim=-1)
            loss_R[part] = -log_rV.gather(1, label_r1)[:, 0]
            if dhidden_RH is not None:
                d_rV = log_rV.exp_().scatter_add_(1, label_r1, log_rV.new_full((1, 1), -1.0).expand_as(label_r1))
                torch.mm(d_rV.to(weight_VH.dtype), weight_VH, out=dhidden_RH[part])
        counts_C = torch.tensor(counts).to(label_R.device, non_blocking=True)
        ctx.save_for_backward(dhidden_RH, counts_C)
        return torch.segment_reduce(loss_R, "sum", lengths=counts_C, unsafe=True)

    @staticmethod
    def backward(ctx: Any, dloss_C: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_RH, counts_C = ctx.saved_tensors
        each_R = dloss_C.repeat_interleave(counts_C, output_size=dhidden_RH.shape[0])
        return dhidden_RH * each_R[:, None].to(dhidden_RH.dtype), None, None, None, None


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
    chosen_B = _answered(answer_B, index_Nk)
    rows_R = answer_B[chosen_B]
    log_RK = nn.functional.log_softmax(_wide(logits_BK[chosen_B]), dim=-1)
    index_Rk, prob_Rk = index_Nk[rows_R].long(), prob_Nk[rows_R].to(log_RK.dtype)
    target_RK = _targets(prob_Rk, index_Rk, log_RK.shape[1])
    return -(target_RK * log_RK).sum(), chosen_B.sum()


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
    return weight * torch.where(sure_R, loss_R, torch.zeros_like(loss_R)).sum(), sure_R.sum()


def classify_losses_C(logits_CBK: Tensor, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
    """``(loss_C, count_C)`` of a classifier: labelled rows, and rows with a teacher's answer.

    Raises:
        LichenError: if a label or an answer lies outside its range, or answers are asked for but not there.
    """
    losses, counts = [], []
    labels_CB, answer_CB = batch.get("labels_CB"), batch.get("answer_CB")
    classes = logits_CBK.shape[-1]
    if labels_CB is not None and bool(((labels_CB >= classes) | ((labels_CB < 0) & (labels_CB != -100))).any()):
        raise LichenError(f"a label lies outside 0..{classes - 1}", where="data", fix="check the model's classes")
    soft = answer_CB is not None and bool((answer_CB >= 0).any())
    if soft and not ("answers.prob" in fixed and "answers.index" in fixed):
        raise LichenError("rows name a teacher's answers, but none came down", where="job")
    for c, logits_BK in enumerate(logits_CBK.unbind(0)):
        # An empty sum: zero, yet part of the graph, for a client with nothing to learn from.
        loss, count = _wide(logits_BK[:0]).sum(), torch.zeros((), dtype=torch.int64, device=logits_BK.device)
        if bool(batch["active_C"][c]):
            if labels_CB is not None:
                loss = loss + nn.functional.cross_entropy(
                    _wide(logits_BK), labels_CB[c], ignore_index=-100, reduction="sum"
                )
                count = count + (labels_CB[c] != -100).sum()
            if soft and answer_CB is not None:
                more, rows = distill_loss(logits_BK, answer_CB[c], fixed)
                loss, count = loss + more, count + rows
        losses.append(loss)
        counts.append(count)
    return torch.stack(losses), torch.stack(counts)
