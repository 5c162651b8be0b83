"""Samples the clients of a round from a seed.

References:
    H. Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson and Blaise Agüera y Arcas.
    "Communication-Efficient Learning of Deep Networks from Decentralized Data." AISTATS 2017.
    https://arxiv.org/abs/1602.05629 (a uniform share of the clients)
    H. Brendan McMahan, Daniel Ramage, Kunal Talwar and Li Zhang. "Learning Differentially Private
    Recurrent Language Models." ICLR 2018. https://arxiv.org/abs/1710.06963 (each client independently)
    Pavlos S. Efraimidis and Paul G. Spirakis. "Weighted random sampling with a reservoir." Information
    Processing Letters 97(5), 2006.

Legend: N clients of the roster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.secret.randomness import Stream
from lichen.core.seeds import numpy_generator

__all__ = ["Everyone", "Poisson", "SecretPoisson", "Uniform", "Weighted", "validators"]


@final
@dataclass(frozen=True, slots=True)
class Everyone:
    """The whole roster, every round."""

    def invite(self, weight_N: Tensor, seed: int) -> tuple[int, ...]:
        """All indices, ascending."""
        return tuple(range(len(weight_N)))


@final
@dataclass(frozen=True, slots=True)
class Uniform:
    """``count`` clients without replacement, all sets equally likely.

    Args:
        count: At least 1, and at most the roster.

    Raises:
        LichenError: if it is not positive.
    """

    count: int

    def __post_init__(self) -> None:
        _check_count(self.count)

    def invite(self, weight_N: Tensor, seed: int) -> tuple[int, ...]:
        """Roster indices, ascending.

        Raises:
            LichenError: if the roster is smaller than ``count``.
        """
        _check_roster(self.count, len(weight_N))
        return _ascending(numpy_generator(seed, "invite").permutation(len(weight_N))[: self.count])


@final
@dataclass(frozen=True, slots=True)
class Poisson:
    """Each client by its own coin, as privacy accounting by subsampling assumes.

    Args:
        rate: Chance of each client, in (0, 1].

    Raises:
        LichenError: if it is out of range.
    """

    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise LichenError(f"{self.rate} is out of range", where="sampling.rate", fix="use 0 < rate <= 1")

    def invite(self, weight_N: Tensor, seed: int) -> tuple[int, ...]:
        """Roster indices, ascending; empty where nobody comes, and the round is then skipped.

        Drawing again until somebody comes would change the distribution the accounting rests on.
        """
        coin_N = numpy_generator(seed, "invite").random(len(weight_N))
        return _ascending(np.flatnonzero(coin_N < self.rate))


@final
@dataclass(frozen=True, slots=True)
class SecretPoisson:
    """Each client by its own coin, of a stream that nobody knows who has not got the key.

    Args:
        rate: Chance of each client, in (0, 1].
        stream: The coins of one round; they are tossed once.
    """

    rate: float
    stream: Stream

    def invite(self, weight_N: Tensor, seed: int) -> tuple[int, ...]:
        """Roster indices, ascending; the seed says nothing here."""
        return _ascending(np.flatnonzero(self.stream.bernoulli(self.rate, len(weight_N)).numpy()))


@final
@dataclass(frozen=True, slots=True)
class Weighted:
    """``count`` clients without replacement, drawn one after the other in proportion to their examples.

    Args:
        count: At least 1, and at most the roster; fewer come where fewer have examples.

    Raises:
        LichenError: if it is not positive.
    """

    count: int

    def __post_init__(self) -> None:
        _check_count(self.count)

    def invite(self, weight_N: Tensor, seed: int) -> tuple[int, ...]:
        """Roster indices, ascending; a client without examples is never among them.

        Raises:
            LichenError: if the roster is smaller than ``count``, or a weight is no number >= 0.
        """
        _check_roster(self.count, len(weight_N))
        w_N = weight_N.double().numpy()
        if not bool(np.isfinite(w_N).all() and (w_N >= 0).all()):
            raise LichenError(
                "a client's weight is not a number >= 0", where="sampling", fix="check the example counts"
            )
        wait_N = numpy_generator(seed, "invite").exponential(size=len(w_N))
        with np.errstate(divide="ignore"):
            wait_N = np.where(w_N > 0, wait_N / w_N, np.inf)
        # Only those who wait no longer than the last to be let in need sorting, not a whole roster of millions.
        within = np.flatnonzero(wait_N <= np.partition(wait_N, self.count - 1)[self.count - 1])
        first = within[np.argsort(wait_N[within], kind="stable")[: self.count]]
        return _ascending(first[np.isfinite(wait_N[first])])


def validators(rows_N: Sequence[int], most: int | None, seed: int) -> tuple[int, ...]:
    """Who validates in the rounds: all clients, or a sample drawn once, of those that have validation rows.

    Args:
        rows_N: Validation rows of every client.
        most: How many clients at most; None: all.
        seed: Of the draw.

    Returns:
        Roster indices, ascending.

    >>> validators([3, 3, 3], 3, 0), validators([3, 0, 3], 2, 0)
    ((0, 1, 2), (0, 2))
    """
    if most is None or len(rows_N) <= most:
        return tuple(range(len(rows_N)))
    able = np.flatnonzero(np.asarray(rows_N) > 0)
    able = able if len(able) else np.arange(len(rows_N))
    return _ascending(numpy_generator(seed, "validators").permutation(able)[:most])


def _ascending(clients: np.ndarray) -> tuple[int, ...]:
    return tuple(np.sort(clients).tolist())


def _check_count(count: int) -> None:
    if count < 1:
        raise LichenError(f"{count} clients are too few", where="sampling.count", fix="use 1 or more")


def _check_roster(count: int, clients: int) -> None:
    if count > clients:
        raise LichenError(
            f"{count} clients are asked of a roster of {clients}", where="sampling.count", fix=f"use at most {clients}"
        )
