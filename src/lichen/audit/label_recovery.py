"""Label recovery: what a gradient says of a class where the head, or what lies right below it, is not the client's own.

The gradient of cross entropy for a row's logits is ``softmax - onehot``: its one negative number is at the label. Below
a linear head ``W`` it is ``W' (softmax - onehot)``, from which least squares gives it back where the rows of ``W``
are independent. So a head stays with whoever has the labels.

References:
    Bo Zhao, Konda Reddy Mopuri and Hakan Bilen. "iDLG: Improved Deep Leakage from Gradients." 2020.
    https://arxiv.org/abs/2001.02610
    Oscar Li, Jiankai Sun, Xin Yang, Weihao Gao, Hongyi Zhang, Junyuan Xie, Virginia Smith and Chong Wang. "Label
    Leakage and Protection in Two-party Split Learning." ICLR 2022. https://arxiv.org/abs/2102.08504

Legend: N rows, K classes, H width below the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lichen.core.errors import LichenError

__all__ = ["labels_below_head", "labels_of_logits"]


def labels_of_logits(gradient_NK: Tensor) -> Tensor:
    """The label of each row by the gradient of its loss for its logits, int64 ``(N,)``.

    >>> labels_of_logits(torch.tensor([[0.2, -0.7, 0.5]]))
    tensor([1])
    """
    return gradient_NK.argmin(-1)


def labels_below_head(gradient_NH: Tensor, weight_KH: Tensor) -> Tensor:
    """The label of each row by the gradient for what goes into a linear head, int64 ``(N,)``.

    Args:
        gradient_NH: Of each row's loss, or of anything that is proportional to it.
        weight_KH: The head's; that of an earlier version will mostly do.

    Raises:
        LichenError: if widths differ.
    """
    if gradient_NH.shape[1] != weight_KH.shape[1]:
        raise LichenError(
            f"gradients of width {gradient_NH.shape[1]} did not come through a head of width {weight_KH.shape[1]}",
            where="split-audit",
        )
    found_KN = torch.linalg.lstsq(weight_KH.double().T, gradient_NH.double().T).solution
    return labels_of_logits(found_KN.T)
