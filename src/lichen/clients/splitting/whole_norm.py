"""Cuts the gradient of a split model to a norm that no side knows alone: each sends the squares of its tensors.

The squares are added in the order of the tensors' names, as :func:`lichen.core.tree.norm_C` does, so that both sides
cut by the factor of a client that holds the whole, bit for bit.

References:
    Razvan Pascanu, Tomas Mikolov and Yoshua Bengio. "On the difficulty of training Recurrent Neural
    Networks." ICML 2013. https://arxiv.org/abs/1211.5063

Legend: C = 1, P tensors of one side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lichen.clients.training.optimize import factor_of_squares
from lichen.core.tree import Tree

__all__ = ["cut_to_norm", "squares"]


def squares(grads_C: Mapping[str, Tensor]) -> Tensor:
    """``(1, P)`` float32: each tensor's squared norm, by name.

    >>> squares({"b": torch.full((1, 2), 2.0), "a": torch.ones(1, 3)})
    tensor([[3., 8.]])
    """
    return torch.stack([grads_C[name][0].square().sum().float().cpu() for name in sorted(grads_C)])[None]


def cut_to_norm(grads_C: Tree, max_norm: float, mine_CP: Tensor, names: Sequence[str], theirs_CP: Tensor) -> Tree:
    """One side's gradients, cut by the factor of the whole.

    Args:
        grads_C: This side's.
        max_norm: The whole's norm, at most.
        mine_CP: Their squares.
        names: The other side's tensors.
        theirs_CP: And their squares, by name.
    """
    every = dict(zip(sorted(grads_C), mine_CP[0], strict=True))
    every |= dict(zip(sorted(names), theirs_CP[0].cpu(), strict=True))
    factor = torch.tensor(factor_of_squares(every, max_norm), dtype=torch.float64)
    return {name: x * factor.to(x) for name, x in grads_C.items()}
