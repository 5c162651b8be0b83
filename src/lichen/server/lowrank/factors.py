"""Matrices as products of two thin factors: norms, and the best factors of a lower rank.

    left (m, R) @ right (R, n)

Through thin QR of both factors everything happens in a core of at most R by R; the product itself is
made only where R is so large that this is cheaper. A matrix that is held whole is one tensor instead.

References:
    Carl Eckart and Gale Young. "The approximation of one matrix by another of lower rank."
    Psychometrika 1(3), 1936 (the leading singular directions are the best factors).
    Jiamu Bai, Daoyuan Chen, Bingchen Qian, Liuyi Yao and Yaliang Li. "Federated Fine-tuning of Large
    Language Models under Heterogeneous Tasks and Client Resources." NeurIPS 2024.
    https://arxiv.org/abs/2402.11505 (FlexLoRA: the mean product's leading directions go back to the clients)

Legend: m rows, n columns, R rank of factors, K directions kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Factors", "Product", "best", "directions", "gap_square", "halves", "norm_square", "shrink"]

Factors = tuple[Tensor, Tensor]
"""``(m, R)`` and ``(R, n)``, float64."""

Product = Factors | Tensor
"""A matrix as its factors, or whole ``(m, n)``."""


def norm_square(product: Product) -> float:
    """The squared Frobenius norm.

    >>> norm_square((torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0]])))
    100.0
    """
    if isinstance(product, Tensor):
        return float(product.square().sum())
    left, right = product
    if _wide(product):
        return float((left @ right).square().sum())
    # Orthonormal factors do not change the norm, so they are not even formed.
    core = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T
    return float(core.square().sum())


def shrink(factors: Factors, floor: float) -> tuple[Factors, float]:
    """``((left, right), norm²)``: the directions with a singular value above ``floor``, none else.

    The norm is that of the whole product; both halves share each singular value's root.
    """
    U, sigma, V = directions(factors)
    keep = int((sigma > floor).sum())
    return halves(U, sigma, V, keep), float(sigma.square().sum())


def best(product: Product, rank: int) -> tuple[Factors, float]:
    """``((left, right), lost)``: the best factors of one rank, and the norm of what they leave out.

    Args:
        product: A matrix.
        rank: Columns of the new left factor; fewer where the matrix has not so many.
    """
    U, sigma, V = directions(product)
    return halves(U, sigma, V, min(rank, len(sigma))), float(sigma[rank:].square().sum().sqrt())


def gap_square(factors: Factors, square: float, other: Factors) -> float:
    """``‖product − other product‖²`` from inner products of thin factors, within rounding of ``square``.

    Args:
        factors: A matrix.
        square: Its squared norm.
        other: Another of the same shape.
    """
    (left, right), (B, A) = factors, other
    cross = float(((left.T @ B) * (right @ A.T)).sum())
    return max(0.0, square - 2 * cross + float(((B.T @ B) * (A @ A.T)).sum()))


def directions(product: Product) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition: ``U (m, ·)``, singular values falling, ``V (·, n)``.

    Factors of rank R below both m and n have R directions, orthonormal also where a value is zero. From
    there on the product is no larger than the factors, and is made.
    """
    if isinstance(product, Tensor) or _wide(product):
        whole = product if isinstance(product, Tensor) else product[0] @ product[1]
        U, sigma, V = torch.linalg.svd(whole, full_matrices=False)
        return U, sigma, V
    Q, L = torch.linalg.qr(product[0])
    P, R = torch.linalg.qr(product[1].T)
    U, sigma, V = torch.linalg.svd(L @ R.T, full_matrices=False)
    return Q @ U, sigma, V @ P.T


def _wide(factors: Factors) -> bool:
    return factors[0].shape[1] >= min(factors[0].shape[0], factors[1].shape[1])


def halves(U: Tensor, sigma: Tensor, V: Tensor, keep: int) -> Factors:
    """The first directions as factors that share each singular value's root."""
    root_K = sigma[:keep].sqrt()
    return U[:, :keep] * root_K, root_K[:, None] * V[:keep]
