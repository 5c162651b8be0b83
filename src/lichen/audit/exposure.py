"""Exposure: how far a row that was trained on has moved up among rows of its kind that were not.

    exposure = log2(rows of its kind) - log2(its rank among them)

A row that nothing sets apart has one bit in the median; the first of all has as many bits as so many rows allow.

References:
    Nicholas Carlini, Chang Liu, Úlfar Erlingsson, Jernej Kos and Dawn Song. "The Secret Sharer: Evaluating and Testing
    Unintended Memorization in Neural Networks." USENIX Security 2019. https://arxiv.org/abs/1802.08232

Legend: M rows that were trained on, N others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lichen.core.errors import LichenError

__all__ = ["exposure"]

Scores = NDArray[np.float64]


def exposure(member_M: Scores, other_N: Scores) -> Scores:
    """Bits of each row, by its rank among the others and itself; ties rank last.

    Args:
        member_M: Scores of rows that were trained on; higher means more like one.
        other_N: Scores of rows of the same kind that were not.

    Raises:
        LichenError: if there are no others, or a score is no number.

    >>> exposure(np.array([9.0, 2.5, 0.0]), np.array([1.0, 2.0, 3.0])).tolist()
    [2.0, 1.0, 0.0]
    """
    if not len(other_N) or np.isnan(member_M).any() or np.isnan(other_N).any():
        raise LichenError("a rank needs others, and scores that are numbers", where="audit")
    above_M = len(other_N) - np.searchsorted(np.sort(other_N), member_M, "left")
    bits_M: Scores = np.log2(len(other_N) + 1) - np.log2(above_M + 1)
    return bits_M
