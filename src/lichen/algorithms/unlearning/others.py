"""Who judges while a client is unlearned: all who would, but for that client."""

from __future__ import annotations

from collections.abc import Collection

from lichen.algorithms.average import Average

__all__ = ["judges_but"]


def judges_but(average: Average, gone: Collection[int]) -> tuple[int, ...]:
    """The validators of these rounds without some clients, ascending."""
    every = range(len(average.weight_N)) if average.validators is None else average.validators
    return tuple(client for client in every if client not in gone)
