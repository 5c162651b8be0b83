"""Is noise that is correlated over rounds (DP-FTRL) smaller where everybody comes? ``python benchmarks/correlated.py``.

A client moves the change of each round by 1 at most, and comes to all n rounds. What is released is C x + N(0, s²) for
the changes x, with s the most that one client moves C x by; sums of the first t changes are B (C x + noise), where B C
sums up. Every way below has the same privacy, that of a normal mechanism, so that the noise in the sums tells
which is best. C has no negative number, and a client that moves every round the same way moves C x most.

No C does better than *least*: one client moves the first t changes by t, and t = b_t · C 1 <= |b_t| s.

References:
    Peter Kairouz, Brendan McMahan, Shuang Song, Om Thakkar, Abhradeep Thakurta and Zheng Xu. "Practical and Private
    (Deep) Learning without Sampling or Shuffling." ICML 2021. https://arxiv.org/abs/2103.00039 (trees)
    James Honaker. "Efficient Use of Differentially Private Binary Trees." TPDP 2015. (the best estimate from a tree)
    Christopher A. Choquette-Choo, H. Brendan McMahan, Keith Rush and Abhradeep Thakurta. "Multi-Epoch Matrix
    Factorization Mechanisms for Private Machine Learning." ICML 2023. https://arxiv.org/abs/2211.06530 (what a client
    moves that comes several times)
    Christopher A. Choquette-Choo et al. "(Amplified) Banded Matrix Factorization: A unified approach to private
    training." NeurIPS 2023. https://arxiv.org/abs/2306.08153
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
ROUNDS = (8, 32, 128)
BANDS = 4


def plain(rounds: int) -> Matrix:
    """Noise of its own in every round."""
    return np.eye(rounds)


def tree(rounds: int) -> Matrix:
    """The nodes of a binary tree over the rounds, which are a power of two."""
    spans = [(first, 1 << h) for h in range(rounds.bit_length()) for first in range(0, rounds, 1 << h)]
    return np.array([[float(first <= r < first + width) for r in range(rounds)] for first, width in spans])


def banded(rounds: int, bands: int = BANDS) -> Matrix:
    """The square root of summing up, cut to some bands."""
    c = np.cumprod([1.0, *((2 * j - 1) / (2 * j) for j in range(1, bands))])
    return sum((c[j] * np.eye(rounds, k=-j) for j in range(min(bands, rounds))), np.zeros((rounds, rounds)))


def noise_of(factor: Matrix) -> Matrix:
    """Deviation of the noise in the sum of the first 1 to n changes, by the best estimate of each."""
    rounds = factor.shape[1]
    sensitivity = np.linalg.norm(factor @ np.ones(rounds))
    sums = np.tril(np.ones((rounds, rounds)))
    return sensitivity * np.linalg.norm(sums @ np.linalg.pinv(factor), axis=1)


def least(rounds: int) -> Matrix:
    """Less noise than this none has."""
    return np.arange(1.0, rounds + 1)


WAYS: dict[str, Callable[[int], Matrix]] = {
    "tree": lambda n: noise_of(tree(n)),
    f"{BANDS} bands": lambda n: noise_of(banded(n)),
    "least": least,
}


def main() -> None:
    """Print the table: noise beside plain noise, over all rounds (root of the mean square) and after the last one."""
    print("| rounds |" + "".join(f" {name}, all rounds | {name}, last |" for name in WAYS))
    print("|---:|" + "---:|" * 2 * len(WAYS))
    for rounds in ROUNDS:
        base = noise_of(plain(rounds))
        cells = []
        for way in WAYS.values():
            found = way(rounds)
            cells += [np.sqrt((found**2).mean() / (base**2).mean()), found[-1] / base[-1]]
        print(f"| {rounds} |" + "".join(f" {x:.2f} |" for x in cells))


if __name__ == "__main__":
    main()
