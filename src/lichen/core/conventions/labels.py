"""How a row without a label is marked: -100 among whole numbers, not-a-number among real ones.

Legend: C clients, B rows.
"""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["NO_CLASS", "has_label", "no_label"]

NO_CLASS = -100


def no_label(*, real: bool) -> float:
    """What stands in place of a label where there is none.

    Args:
        real: Labels are real numbers.
    """
    return math.nan if real else NO_CLASS


def has_label(labels_CB: Tensor) -> Tensor:
    """Bool ``(C, B)``: the rows with a label.

    Args:
        labels_CB: One label a row, or several ``(C, B, ...)``, of which each must be there.

    >>> import torch
    >>> has_label(torch.tensor([[2, -100]])), has_label(torch.tensor([[[0.5, 1.0], [0.5, float("nan")]]]))
    (tensor([[ True, False]]), tensor([[ True, False]]))
    """
    known = ~labels_CB.isnan() if labels_CB.is_floating_point() else labels_CB >= 0
    return known.flatten(2).all(2) if known.dim() > 2 else known
