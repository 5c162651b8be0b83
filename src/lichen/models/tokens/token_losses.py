"""Losses of language models at labelled places, whose logits are never held whole.

The sum over one client's places, or over each row's: the first is what training takes, the second what needs every
row's gradient takes.

Legend: C clients, B rows, H width, R labelled places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["linear_loss_C", "token_loss", "token_losses"]


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


def token_losses(
    head: Callable[[Tensor], Tensor], hidden_RH: Tensor, label_R: Tensor, counts: Sequence[int], *, chunk: int = 1024
) -> Tensor:
    """``(B,)``: :func:`token_loss` of each row.

    Args:
        head: The output layer.
        hidden_RH: Hidden states of the labelled places, row by row.
        label_R: Labels.
        counts: Labelled places of each row.
        chunk: Places at once.
    """

    def part(hidden: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(_wide(head(hidden)), label, reduction="none")

    if not len(label_R):
        return _wide(hidden_RH).sum().expand(len(counts))
    if len(label_R) <= chunk:
        loss_R = part(hidden_RH, label_R)
    else:
        chunks = zip(torch.split(hidden_RH, chunk), torch.split(label_R, chunk), strict=True)
        grown = torch.is_grad_enabled()
        loss_R = torch.cat([checkpoint(part, *x, use_reentrant=False) if grown else part(*x) for x in chunks])
    return torch.stack([row_R.sum() for row_R in torch.split(loss_R, list(counts))])


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
        counts: Labelled places of each client; or of each row, for the losses of rows.
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
