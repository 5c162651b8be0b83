"""A lower bound on ε from one run: m canaries, each trained on by a coin, and guesses which of them were.

If training is (ε, δ)-private, no guesser is right more often than ε allows. So many right guesses rule small ε out.
It is a smoke alarm: loose by design, it finds noise that is missing or far too small, and proves no privacy.

References:
    Thomas Steinke, Milad Nasr and Matthew Jagielski. "Privacy Auditing with One (1) Training Run." NeurIPS 2023.
    https://arxiv.org/abs/2305.08846

Legend: M canaries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from lichen.core.errors import LichenError

__all__ = ["Bound", "bounded", "epsilon_at_least", "guessed"]

MOST = 64.0
"""No bound above this is looked for: e^64 is more than any count of guesses tells."""


SHARES = (0.8, 0.4, 0.2, 0.1)
"""Of the canaries that are guessed, in :func:`bounded`; half of all would be too many to call in where fewer are."""


def epsilon_at_least(
    guesses: int, right: int, *, canaries: int | None = None, delta: float = 0.0, confidence: float = 0.95
) -> float:
    """The largest ε that so many right guesses rule out; 0 where they rule out none.

    Args:
        guesses: r, for how many canaries somebody guessed.
        right: v, of them.
        canaries: m, of all; None: as many as guesses. It matters where δ is not 0.
        delta: δ of the statement that is tested.
        confidence: That the true ε is not below.

    Raises:
        LichenError: if the counts do not fit one another, or a chance is none.

    >>> [round(epsilon_at_least(r, v), 3) for r, v in ((100, 100), (100, 90), (1000, 750), (50, 50), (100, 40))]
    [3.493, 1.631, 0.977, 2.785, 0.0]
    """
    total = guesses if canaries is None else canaries
    if not 0 <= right <= guesses <= total or not 0 <= delta < 1 or not 0 < confidence < 1:
        raise LichenError(
            f"{right} right of {guesses} guesses on {total} canaries at δ = {delta}",
            where="audit",
            fix="use right <= guesses <= canaries and chances",
        )
    low, high, most = 0.0, MOST, 1 - confidence
    if guesses == 0 or _chance(0.0, guesses, right, total, delta) >= most:
        return 0.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _chance(middle, guesses, right, total, delta) < most else (low, middle)
    return low


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What guesses say of ε.

    Attributes:
        epsilon: It is not below, at the confidence that was asked for.
        guesses: r, of which the bound comes.
        right: v, of them.
    """

    epsilon: float
    guesses: int
    right: int


def bounded(score_M: Tensor, included_M: Tensor, *, delta: float = 0.0, confidence: float = 0.95) -> Bound:
    """The largest bound of several numbers of guesses: most canaries, or those alone with the most telling scores.

    Which number is best depends on the attack, and to choose it by the result would say too much: each is tested at its
    share of the doubt, so that all hold together.

    Args:
        score_M: The higher, the more it looks like a row that was trained on.
        included_M: bool, whether it was.
        delta: δ of the statement that is tested.
        confidence: That the true ε is not below.

    >>> found = bounded(torch.arange(100.0), torch.arange(100) >= 50)
    >>> round(found.epsilon, 3), found.right, found.guesses
    (2.877, 80, 80)
    """
    total = len(score_M)
    numbers = sorted({max(1, round(share * total)) for share in SHARES}, reverse=True)
    each = 1 - (1 - confidence) / len(numbers)
    found = []
    for guesses in numbers:
        right = guessed(score_M, included_M, guesses)
        epsilon = epsilon_at_least(guesses, right, canaries=total, delta=delta, confidence=each)
        found.append(Bound(epsilon=epsilon, guesses=guesses, right=right))
    return max(found, key=lambda one: one.epsilon)


def _chance(epsilon: float, guesses: int, right: int, canaries: int, delta: float) -> float:
    """At most how likely as many right guesses are under (ε, δ)-privacy; theorem 5.2 of the paper."""
    log_q = -math.log1p(math.exp(-epsilon))
    log_p = -epsilon + log_q
    k = np.arange(guesses + 1)
    factorial = np.array([math.lgamma(n + 1) for n in range(guesses + 1)])
    pmf = np.exp(factorial[-1] - factorial[k] - factorial[guesses - k] + k * log_q + (guesses - k) * log_p)
    beta = float(pmf[right:].sum())
    if delta == 0 or right == 0:
        return min(beta, 1.0)
    below = np.cumsum(pmf[:right][::-1])  # P[v - i <= X < v] for i = 1, 2, ...
    alpha = float((below / np.arange(1, right + 1)).max())
    return min(beta + 2 * canaries * delta * alpha, 1.0)


def guessed(score_M: Tensor, included_M: Tensor, guesses: int) -> int:
    """How many guesses are right: half of them "trained on" for the highest scores, half "not" for the lowest.

    Args:
        score_M: The higher, the more it looks like a row that was trained on.
        included_M: bool, whether it was.
        guesses: For how many; the middle ones are left out. An odd one guesses "trained on".

    Raises:
        LichenError: for more guesses than canaries.
    """
    if not 0 <= guesses <= len(score_M):
        raise LichenError(f"{guesses} guesses on {len(score_M)} canaries", where="audit", fix="use fewer")
    order_M = torch.argsort(score_M, descending=True, stable=True)
    yes, no = -(-guesses // 2), guesses // 2
    included_M = included_M[order_M]
    return int(included_M[:yes].sum()) + int((~included_M[len(order_M) - no :]).sum())
