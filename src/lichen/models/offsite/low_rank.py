"""Rounds the attention of an emulator's middle to a low rank, so that it says less of the model than its own blocks do.

Each matrix of a middle block's attention becomes its best approximation of rank r (Eckart and Young). ScaleOT does so
with attention, and puts small learned blocks in place of layers that matter little; here the blocks are those of the
uniform stride, and nothing is learned.

References:
    Kai Yao, Zhaorui Tan, Tiandi Ye, Lichun Li, Yuan Zhao, Wenyan Liu, Wei Wang and Jianke Zhu. "ScaleOT:
    Privacy-utility-scalable Offsite-tuning with Dynamic LayerReplace and Selective Rank Compression." AAAI 2025.
    https://arxiv.org/abs/2412.09812

Legend: o out, i in, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["low_rank", "rounded"]

_ATTENTION = frozenset({"attn", "self_attn", "attention"})


def _is_attention(name: str, x: Tensor) -> bool:
    """Whether a tensor of a block is a matrix of its attention.

    >>> [_is_attention(f"h.1.{name}.weight", torch.zeros(2, 6)) for name in ("attn.c_attn", "mlp.c_fc")]
    [True, False]
    """
    return (
        x.dim() == 2 and x.is_floating_point() and name.endswith(".weight") and bool(_ATTENTION & set(name.split(".")))
    )


def low_rank(x_oi: Tensor, rank: int) -> Tensor:
    """The nearest matrix of this rank, in the dtype of the given one.

    >>> torch.linalg.matrix_rank(low_rank(torch.eye(4), 2)).item()
    2
    """
    left_or, size_r, right_ri = torch.linalg.svd(x_oi.double(), full_matrices=False)
    nearest_oi: Tensor = left_or[:, :rank] * size_r[:rank] @ right_ri[:rank]
    return nearest_oi.to(x_oi.dtype)


def rounded(tensors: Tree, rank: int | None) -> Tree:
    """The attention of these blocks at a low rank.

    Args:
        tensors: Of the emulator's middle.
        rank: r; None: an eighth of each matrix's smaller side.

    Returns:
        The matrices that have changed, under their names.

    Raises:
        LichenError: if a rank is out of range, or no block has an attention that is known by its name.
    """
    found = {name: x for name, x in tensors.items() if _is_attention(name, x)}
    if not found:
        raise LichenError("no attention is found among the blocks", where="--how low-rank", fix="use drop or distil")
    smallest = min(min(x.shape) for x in found.values())
    if rank is not None and not 1 <= rank <= smallest:
        raise LichenError(f"rank {rank} of matrices of {smallest}", where="--rank", fix=f"use 1 to {smallest}")
    return {name: low_rank(x, rank or max(1, min(x.shape) // 8)) for name, x in found.items()}
