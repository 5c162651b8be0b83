"""The gradient of every row by itself: a row is a client of one row.

A cohort model has a client axis, and a client's tensors pass through its own rows only. So rows that stand on that
axis, each with a copy of its client's trained tensors, have gradients of their own: for every adapter, head and
student, packed and padded, over the one frozen base. What stands in memory is a copy and a gradient of the trained
tensors a row, so the caller cuts batches to as many rows as fit.

References:
    Ian Goodfellow. "Efficient Per-Example Gradient Computations." 2015. https://arxiv.org/abs/1510.01799
    Xuechen Li, Florian Tramèr, Percy Liang and Tatsunori Hashimoto. "Large Language Models Can Be Strong
    Differentially Private Learners." ICLR 2022. https://arxiv.org/abs/2110.05679 (a row's loss is the mean over
    its tokens).

Legend: C clients, B rows of a batch, R rows that are there, on the client axis, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.tree import Tree

__all__ = ["clipped_sum_C", "grid_of", "row_gradients", "row_norms"]

BITS = 36
"""Of a clipped gradient below its bound; 2^16 rows more and a sum is as long as a float64 is exact."""


def row_gradients(
    model: CohortModel, trained_C: Tree, frozen_C: Tree, fixed: Tree, batch: Batch, *, at_once: int | None = None
) -> Iterator[tuple[Tensor, Tree]]:
    """``(client_R, grads_R)``: some rows' clients, and the gradient of each row's mean loss; in order, none twice.

    Args:
        model: What is trained.
        trained_C: Tensors that gradients are of, ``(C, ...)``.
        frozen_C: Trainable tensors that are not trained here, ``(C, ...)``.
        fixed: Shared tensors without client axis.
        batch: One batch of C clients; padding rows and those of inactive clients are left out.
        at_once: Rows side by side; None: all of them.
    """
    device = next(iter(trained_C.values())).device
    real_CB = (batch["index_CB"] >= 0) & batch["active_C"][:, None]
    real_R2 = real_CB.nonzero()
    width = at_once or max(len(real_R2), 1)
    for first in range(0, len(real_R2), width):
        client_R, place_R = real_R2[first : first + width].unbind(1)
        rows = {name: x[client_R, place_R][:, None] for name, x in batch.items() if name != "active_C"}
        rows["active_C"] = torch.ones(len(client_R), dtype=torch.bool)
        here_R = client_R.to(device)
        leaves_R = {name: x.detach()[here_R].requires_grad_() for name, x in trained_C.items()}
        frozen_R = {name: x.detach()[here_R] for name, x in frozen_C.items()}
        with torch.enable_grad():
            loss_R, count_R = model.loss({**leaves_R, **frozen_R}, fixed, rows)
            mean_R = loss_R / count_R.clamp(min=1)
            grads = torch.autograd.grad(
                mean_R.sum(), list(leaves_R.values()), allow_unused=True, materialize_grads=True
            )
        yield here_R, dict(zip(leaves_R, grads, strict=True))


def row_norms(grads_R: Tree, *, exact: bool) -> Tensor:
    """``(R,)`` float64: the Euclidean norm of each row's gradient, over all tensors together.

    Args:
        grads_R: Gradients, ``(R, ...)``.
        exact: Each row by itself, so that it has the same bits in any company; or all in one call.
    """
    if not exact:
        each = [torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64) for x in grads_R.values()]
        norm_R: Tensor = torch.linalg.vector_norm(torch.stack(each), dim=0)
        return norm_R
    rows, squares = len(next(iter(grads_R.values()))), []
    for r in range(rows):
        square = torch.zeros((), dtype=torch.float64)
        for name in sorted(grads_R):
            square = square + grads_R[name][r].double().square().sum()
        squares.append(square)
    return torch.stack(squares).sqrt()


def grid_of(clip: float) -> int:
    """Bits after the point on which sums of gradients of norm ``clip`` lie, with 36 below the bound.

    >>> grid_of(1.0), grid_of(0.3), grid_of(8.0)
    (36, 38, 33)
    """
    return BITS - math.floor(math.log2(clip))


def clipped_sum_C(sum_C: Tree, client_R: Tensor, grads_R: Tree, clip: float, *, exact: bool) -> Tree:
    """The sums with each row's gradient in its client's, cut to norm ``clip``; smaller ones go in whole.

    What goes in is rounded towards zero to whole units of a grid, so the norm never passes the bound by rounding, the
    sums of up to 65,536 rows are exact in any order, and noise on the same grid hides their low bits too. A row whose
    gradient is not finite adds nothing: it must neither end a client's training, which would tell of it, nor pass
    the bound.

    Args:
        sum_C: Sums so far, float64 ``(C, ...)``.
        client_R: Whose rows they are.
        grads_R: Their gradients.
        clip: The norm at most.
        exact: Each row's norm has the same bits in any company.
    """
    norm_R, grid = row_norms(grads_R, exact=exact), 2.0 ** grid_of(clip)
    factor_R = torch.where(norm_R.isfinite(), (clip / norm_R).clamp(max=1) * grid, 0.0)
    sums = {}
    for name, total_C in sum_C.items():
        factors = factor_R.to(total_C.device).view(-1, *[1] * (total_C.dim() - 1))
        cut_R = grads_R[name].to(torch.float64, copy=True).mul_(factors).masked_fill_(factors == 0, 0.0)
        sums[name] = total_C.index_add(0, client_R, cut_R.trunc_(), alpha=1 / grid)
    return sums
