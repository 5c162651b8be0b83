"""How well a score tells rows that were trained on from rows that were not, with an interval.

References:
    Reza Shokri, Marco Stronati, Congzheng Song and Vitaly Shmatikov. "Membership Inference Attacks Against Machine
    Learning Models." IEEE S&P 2017. https://arxiv.org/abs/1610.05820
    Nicholas Carlini, Steve Chien, Milad Nasr, Shuang Song, Andreas Terzis and Florian Tramèr. "Membership Inference
    Attacks From First Principles." IEEE S&P 2022. https://arxiv.org/abs/2112.03570 (true positives at few false ones)
    Bradley Efron. "Better Bootstrap Confidence Intervals." JASA 82(397), 1987.

Legend: M members, N others, K resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator

__all__ = ["Separation", "auc", "separation", "true_positives"]

Scores = NDArray[np.float64]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Separation:
    """What a score tells.

    Attributes:
        auc: Chance that a member scores above another row; 0.5 is a coin.
        auc_low: Lower end of its interval.
        auc_high: Upper end.
        tpr: Members found where at most ``false_rate`` of the others are taken for members.
        tpr_low: Lower end of its interval.
        tpr_high: Upper end.
        members: How many.
        others: How many.
        false_rate: As asked.
    """

    auc: float
    auc_low: float
    auc_high: float
    tpr: float
    tpr_low: float
    tpr_high: float
    members: int
    others: int
    false_rate: float


def auc(member_M: Scores, other_N: Scores) -> float:
    """The chance that a member scores above another row; ties count half.

    >>> auc(np.array([3.0, 2.0]), np.array([1.0, 2.0]))
    0.875
    """
    ordered = np.sort(other_N)
    below = np.searchsorted(ordered, member_M, "left") + np.searchsorted(ordered, member_M, "right")
    return float(below.sum() / (2 * len(member_M) * len(other_N)))


def true_positives(member_M: Scores, other_N: Scores, false_rate: float) -> float:
    """The share of members above a threshold that at most this share of the others is above.

    >>> true_positives(np.array([5.0, 2.0]), np.array([1.0, 3.0, 0.0, 0.0]), 0.01)
    0.5
    """
    allowed = int(false_rate * len(other_N))
    return float((member_M > np.sort(other_N)[::-1][allowed]).mean()) if allowed < len(other_N) else 1.0


def separation(
    member_M: Scores,
    other_N: Scores,
    *,
    seed: int,
    false_rate: float = 0.01,
    resamples: int = 1000,
    level: float = 0.95,
) -> Separation:
    """Both numbers, with percentile intervals from rows drawn again with replacement.

    Args:
        member_M: Scores of rows that were trained on; higher means more like one.
        other_N: Scores of rows that were not.
        seed: Of the draws.
        false_rate: Others that may be taken for members.
        resamples: K.
        level: Of the intervals.

    Raises:
        LichenError: if one side is empty or a score is no number.
    """
    if not len(member_M) or not len(other_N):
        raise LichenError(f"{len(member_M)} members and {len(other_N)} others", where="audit", fix="use rows of both")
    if not (np.isfinite(member_M).all() and np.isfinite(other_N).all()):
        raise LichenError("a row's score is no finite number", where="audit")
    generator, draws = numpy_generator(seed, "bootstrap"), []
    for _ in range(resamples):
        some_M = member_M[generator.integers(0, len(member_M), len(member_M))]
        some_N = other_N[generator.integers(0, len(other_N), len(other_N))]
        draws.append((auc(some_M, some_N), true_positives(some_M, some_N, false_rate)))
    ends = np.quantile(np.array(draws), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Separation(
        auc=auc(member_M, other_N),
        auc_low=float(ends[0, 0]),
        auc_high=float(ends[1, 0]),
        tpr=true_positives(member_M, other_N, false_rate),
        tpr_low=float(ends[0, 1]),
        tpr_high=float(ends[1, 1]),
        members=len(member_M),
        others=len(other_N),
        false_rate=false_rate,
    )
