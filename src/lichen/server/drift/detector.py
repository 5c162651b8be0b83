"""A drift detector: a fold over numbers that says when they are no longer what they were.

State goes in and comes out. It has a fixed number of numbers in it, so that the states of many clients stack.

Legend: S numbers of a dumped state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

from torch import Tensor

from lichen.core.errors import LichenError

__all__ = ["Detector", "Direction", "damaged", "watch"]

Direction = Literal["up", "down", "both"]
"""Which way the mean must go for an alarm: a loss that falls is no harm."""


class Detector(Protocol):
    """Watches a series of numbers, one after the other. After an alarm it begins anew with what comes next."""

    @property
    def size(self) -> int:
        """S, the same for every state."""
        ...

    def zero(self) -> Any:
        """Nothing seen."""
        ...

    def update(self, state: Any, value: float) -> tuple[Any, bool]:
        """``(state, alarm)`` after one more number; the state before stays as it is."""
        ...

    def dump(self, state: Any) -> Tensor:
        """A state as float64 ``(S,)``."""
        ...

    def load(self, x_S: Tensor) -> Any:
        """Undo :meth:`dump`: the state goes on to the same bits.

        Raises:
            LichenError: if this is no state of such a detector.
        """
        ...


def watch(detector: Detector, values: Iterable[float], state: Any = None) -> tuple[Any, list[int]]:
    """Fold a series.

    Args:
        detector: Any.
        values: In their order.
        state: Where an earlier part of the series ended; None: at its beginning.

    Returns:
        The state after the last number, and the positions in ``values`` at which there was an alarm.
    """
    state = detector.zero() if state is None else state
    alarms: list[int] = []
    for position, value in enumerate(values):
        state, alarm = detector.update(state, value)
        if alarm:
            alarms.append(position)
    return state, alarms


def damaged(what: str) -> LichenError:
    """What is raised where a dumped state is none."""
    return LichenError(
        f"these numbers are no state of {what}", where="drift", fix="delete the private state, and watch from anew"
    )
