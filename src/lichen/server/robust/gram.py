"""Inner products between clients' rows, in float64, and the distances that follow from them.

    ‖x_i − x_j‖² = G_ii + G_jj − 2 G_ij,    G = X Xᵀ

G is summed over stretches of columns, so that X is never whole in memory. Nothing is subtracted from the rows first: a
mean holds every liar's row, and one of 1e9 times the norm would take all digits from the distances between honest
ones. As it is, a liar's numbers are in its own row and column of G alone.

The change that a client makes to the product ``B A`` of a LoRA layer has two factors of twice the rank,

    (B + ΔB_k)(A + ΔA_k) − B A = [ΔB_k  B] [A + ΔA_k ; ΔA_k] = L_k R_k,

and inner products of changes are those of small matrices: ⟨L_i R_i, L_j R_j⟩ = Σ (L_iᵀ L_j) ∘ (R_i R_jᵀ).
The product itself is never made. The layer's scaling alpha / r is left out; it is the same for all.

Legend: C clients, N numbers of one client, m rows of a layer's weight (out), n columns (in), r adapter rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lichen.core.conventions.factor_pairs import factor_names
from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.server.robust.rows import Row, Span, block_CN, stretches

__all__ = ["distances_CC", "gram_CC", "product_gram_CC"]

_BLOCK = 2**21  # numbers of the factors of some clients


def gram_CC(rows: Sequence[Row], spans: Sequence[Span]) -> Tensor:
    """The inner products of all rows over these columns, float64 ``(C, C)``."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for span in stretches(spans, len(rows)):
        x_CN = block_CN(rows, span)
        gram += x_CN @ x_CN.T
    return (gram + gram.T) / 2


def distances_CC(gram: Tensor) -> Tensor:
    """Squared distances, 0 or more, out of inner products ``(C, C)``."""
    square_C = gram.diagonal()
    distance = (square_C[:, None] + square_C[None, :] - 2 * gram).clamp(min=0)
    return distance.fill_diagonal_(0.0)


def product_gram_CC(rows: Sequence[Row], spans: dict[str, Span], layer: str, shared: Tree) -> Tensor:
    """The inner products of what clients change in a layer's product ``B A``, float64 ``(C, C)``.

    Args:
        rows: Of the clients.
        spans: The columns of each tensor.
        layer: Both its factors are among them.
        shared: Holds the factors that clients began from.

    Raises:
        LichenError: if the shared factors are missing, or of another shape.
    """
    name_A, name_B = factor_names(layer)
    if name_A not in shared or name_B not in shared:
        raise LichenError(f"the model has no factors of layer {layer!r}", where="aggregator", fix="use of: factors")
    A_rn, B_mr = (shared[name].detach().cpu().double() for name in (name_A, name_B))
    for name, x in ((name_A, A_rn), (name_B, B_mr)):
        if x.numel() != spans[name][1] - spans[name][0]:
            what = f"{spans[name][1] - spans[name][0]} numbers of {name!r} do not fit the model's {tuple(x.shape)}"
            raise LichenError(what, where="aggregator", fix="let clients and server load the same recipe")
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    step = max(_BLOCK // (2 * (A_rn.numel() + B_mr.numel()) or 1), 1)
    starts = range(0, len(rows), step)
    for i in starts:
        left_i, right_i = _factors(rows[i : i + step], spans, layer, A_rn, B_mr)
        for j in range(0, i + 1, step):
            left_j, right_j = (left_i, right_i) if i == j else _factors(rows[j : j + step], spans, layer, A_rn, B_mr)
            inner = torch.stack(
                [
                    ((left.T @ left_j) * (right @ right_j.mT)).sum((1, 2))
                    for left, right in zip(left_i, right_i, strict=True)
                ]
            )
            gram[i : i + step, j : j + step] = inner
            gram[j : j + step, i : i + step] = inner.T
    return (gram + gram.T) / 2


def _factors(
    rows: Sequence[Row], spans: dict[str, Span], layer: str, A_rn: Tensor, B_mr: Tensor
) -> tuple[Tensor, Tensor]:
    """``[ΔB  B]`` of ``(C, m, 2r)`` and ``[A + ΔA ; ΔA]`` of ``(C, 2r, n)``."""
    name_A, name_B = factor_names(layer)
    dA = block_CN(rows, spans[name_A]).view(len(rows), *A_rn.shape)
    dB = block_CN(rows, spans[name_B]).view(len(rows), *B_mr.shape)
    return torch.cat([dB, B_mr.expand_as(dB)], 2), torch.cat([A_rn + dA, dA], 1)
