"""Losses as sums over one client's own rows, so that a client's number has the same bits in any company.

torch splits a reduction by the shape of the whole tensor; every sum here is therefore taken on one
client's slice.

References:
    Hinton, Vinyals and Dean (2015). Distilling the Knowledge in a Neural Network. arXiv:1503.02531.

Legend: C clients, B rows, K classes, N rows of the shared answers, k answers kept of each row, V
vocabulary, R rows with a label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lichen.core.contracts import Batch
from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["classify_losses_C", "linear_loss_C", "soft_loss", "token_loss"]


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


def soft_loss(logits_BK: Tensor, answer_B: Tensor, prob_Nk: Tensor, index_Nk: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy against a teacher's top answers, summed over the rows that have one.

    What the kept answers leave of the probability is spread evenly on the other classes.

    Args:
        logits_BK: The student's logits.
        answer_B: Row of the shared answers, -1 where there is none.
        prob_Nk: The teacher's probabilities.
        index_Nk: The classes they belong to.

    Returns:
        ``(loss, count)``: the sum and the number of rows in it.
    """
    chosen_B = answer_B >= 0
    rows_R = answer_B[chosen_B]
    log_RK = nn.functional.log_softmax(_wide(logits_BK[chosen_B]), dim=-1)
    index_Rk, prob_Rk = index_Nk[rows_R].long(), prob_Nk[rows_R].to(log_RK.dtype)
    others = log_RK.shape[1] - index_Rk.shape[1]
    left_R1 = (1 - prob_Rk.sum(1, keepdim=True)).clamp(min=0) / max(others, 1)
    spread_RK = left_R1.expand(-1, log_RK.shape[1]).contiguous()
    target_RK = spread_RK.scatter(1, index_Rk, prob_Rk)
    return -(target_RK * log_RK).sum(), chosen_B.sum()


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
                more, rows = soft_loss(logits_BK, answer_CB[c], fixed["answers.prob"], fixed["answers.index"])
                loss, count = loss + more, count + rows
        losses.append(loss)
        counts.append(count)
    return torch.stack(losses), torch.stack(counts)
