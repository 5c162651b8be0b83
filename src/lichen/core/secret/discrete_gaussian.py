"""Draws whole numbers from the discrete Gaussian by coins, many at a time.

    P(y) ∝ exp(-y² / 2σ²),  y an integer

A float's normal draw tells by its low bits which values it cannot have come from, and so may give a secret sum away
(Mironov). Here noise is a whole number of units of the grid on which sums lie, so that sum and noise add exactly. The
algorithm is that of Canonne, Kamath and Steinke: a discrete Laplace number is drawn and then accepted with chance
``exp(-γ)``, so that the numbers come from uniform words and coins alone.

**How exact.** A coin of chance exp(-f), 0 ≤ f < 1, is a word of 63 bits below a threshold from a float64 exponential:
within 2^-51 of its chance, relatively; greater exponents are tossed factor by factor. With a = |y|/σ, the chance of y
is off by a factor within 1 ± 2^-50 (4 + a + a²). Both neighbours' outputs are off by such factors, so that ε grows by
their logarithms; over 2·10⁷ numbers these come to less than 10⁻⁶ with overwhelming probability, for a² is 1 in the
mean. A discrete Gaussian differs from a continuous one that was rounded by factors within 1 ± (1 + a²) / 24σ², 2^-52
at σ = 2^24 units. To round after the noise is no more than to look at it, so what is accounted for the continuous
mechanism holds.

The time that it takes depends on the noise: nobody who could measure that should be near a server.

References:
    Clément L. Canonne, Gautam Kamath and Thomas Steinke. "The Discrete Gaussian for Differential Privacy." NeurIPS
    2020. https://arxiv.org/abs/2004.00010
    Ilya Mironov. "On Significance of the Least Significant Bits for Differential Privacy." CCS 2012.

Legend: N numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Words", "coins", "discrete_gaussian"]

Words = Callable[[int], NDArray[np.uint64]]
"""Gives so many uniform words of 64 bits, new ones at each call."""

_ONE = 2.0**63
_STEP = np.uint64(int(math.exp(-1.0) * _ONE))
_AT_ONCE = 1 << 18


def discrete_gaussian(words: Words, count: int, sigma: int) -> NDArray[np.int64]:
    """``count`` independent numbers, int64.

    Args:
        words: Uniform words.
        count: How many.
        sigma: σ, at least 1 and below 2^56.
    """
    out = np.empty(count, dtype=np.int64)
    for start in range(0, count, _AT_ONCE):
        waiting = np.arange(start, min(start + _AT_ONCE, count))
        while waiting.size:
            y_N = _laplace(words, waiting.size, sigma + 1)
            a_N = np.abs(y_N) / sigma - sigma / (sigma + 1)
            accepted_N = _exp_coins(words, a_N * a_N / 2)
            out[waiting[accepted_N]] = y_N[accepted_N]
            waiting = waiting[~accepted_N]
    return out


def coins(words: Words, count: int, chance: float) -> NDArray[np.bool_]:
    """``count`` coins, each true with this chance, to 2^-63.

    >>> coins(lambda count: np.full(count, 2**63, dtype=np.uint64), 2, 0.75)
    array([ True,  True])
    """
    if chance >= 1:
        return np.ones(count, dtype=np.bool_)
    return (words(count) >> np.uint64(1)) < np.uint64(int(chance * _ONE))


def _laplace(words: Words, count: int, scale: int) -> NDArray[np.int64]:
    """``P(y) ∝ exp(-|y| / scale)``."""
    out = np.empty(count, dtype=np.int64)
    waiting = np.arange(count)
    while waiting.size:
        u_N = _below(words, waiting.size, scale)
        good_N = _exp_coins(words, u_N / scale)
        rows, u_N = waiting[good_N], u_N[good_N]
        v_N = _geometric(words, len(rows))
        negative_N = (words(len(rows)) & np.uint64(1)).astype(np.bool_)
        size_N = u_N + scale * v_N
        counted_N = ~(negative_N & (size_N == 0))  # 0 would come twice
        out[rows[counted_N]] = np.where(negative_N, -size_N, size_N)[counted_N]
        waiting = np.concatenate([waiting[~good_N], rows[~counted_N]])
    return out


def _below(words: Words, count: int, limit: int) -> NDArray[np.int64]:
    """Uniform in ``[0, limit)``."""
    mask = np.uint64((1 << (limit - 1).bit_length()) - 1)
    out = np.empty(count, dtype=np.int64)
    waiting = np.arange(count)
    while waiting.size:
        u_N = (words(waiting.size) & mask).astype(np.int64)
        good_N = u_N < limit
        out[waiting[good_N]] = u_N[good_N]
        waiting = waiting[~good_N]
    return out


def _geometric(words: Words, count: int) -> NDArray[np.int64]:
    """How often a coin of chance 1/e falls on the right side before it does not."""
    out = np.zeros(count, dtype=np.int64)
    going = np.arange(count)
    while going.size:
        going = going[(words(going.size) >> np.uint64(1)) < _STEP]
        out[going] += 1
    return out


def _exp_coins(words: Words, exponent_N: NDArray[np.float64]) -> NDArray[np.bool_]:
    """A coin of chance ``exp(-exponent)`` each."""
    whole_N = np.floor(exponent_N)
    threshold_N = (np.exp(whole_N - exponent_N) * _ONE).astype(np.uint64)
    out = (words(len(exponent_N)) >> np.uint64(1)) < threshold_N
    going = np.flatnonzero(out & (whole_N >= 1))
    factor = 1
    while going.size:
        good_N = (words(going.size) >> np.uint64(1)) < _STEP
        out[going[~good_N]] = False
        factor += 1
        going = going[good_N]
        going = going[whole_N[going] >= factor]
    return out
