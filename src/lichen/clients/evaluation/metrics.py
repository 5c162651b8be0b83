"""Computes metrics from sums and counts that clients may add up.

Legend: K classes. ``confusion_KK[i, j]`` counts rows of class i that were taken for class j.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["accuracy", "macro_f1", "perplexity"]


def accuracy(confusion_KK: Tensor) -> float:
    """Share of rows on the diagonal; NaN where there are no rows.

    >>> accuracy(torch.tensor([[3, 1], [0, 4]]))
    0.875
    """
    total = float(confusion_KK.sum())
    return float(confusion_KK.diagonal().sum()) / total if total else math.nan


def macro_f1(confusion_KK: Tensor) -> float:
    """Mean F1 over the classes that occur, as a truth or as a guess; NaN where there are no rows.

    >>> round(macro_f1(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])), 4)
    0.873
    """
    counts_KK = confusion_KK.to(torch.float64)
    hits_K = counts_KK.diagonal()
    either_K = counts_KK.sum(0) + counts_KK.sum(1)
    occurs_K = either_K > 0
    return float((2 * hits_K[occurs_K] / either_K[occurs_K]).mean()) if bool(occurs_K.any()) else math.nan


def perplexity(loss_sum: float, count: float) -> float:
    """``exp(loss_sum / count)``; NaN where nothing was counted, infinite where it overflows.

    >>> round(perplexity(loss_sum=6.931471805599453, count=10), 6)
    2.0
    """
    if not count:
        return math.nan
    try:
        return math.exp(loss_sum / count)
    except OverflowError:
        return math.inf
