"""Draws which clients lie, once for a whole run."""

from __future__ import annotations

from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator

__all__ = ["liars"]


def liars(count: int, clients: int, seed: int) -> tuple[int, ...]:
    """The clients that lie, ascending; with the same seed, more liars are the former ones and others.

    Args:
        count: How many lie.
        clients: How many there are.
        seed: The recipe's.

    Raises:
        LichenError: if no client would be honest.

    >>> set(liars(2, 10, 0)) < set(liars(3, 10, 0))
    True
    """
    if not 0 < count < clients:
        raise LichenError(
            f"{count} of {clients} clients cannot lie: somebody must be honest",
            where="attack.liars",
            fix=f"use 1 to {max(clients - 1, 1)}, or more clients",
        )
    return tuple(sorted(numpy_generator(seed, "liars").permutation(clients)[:count].tolist()))
