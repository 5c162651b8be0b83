"""When things happen: who is asked beside those still at work, when a round has enough, what an old answer weighs.

Members are in :mod:`lichen.server.schedules`. A schedule knows no engine: its seconds are those of whatever engine
runs, the world's or a simulated clock's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

__all__ = ["Schedule", "VirtualClock"]


class Schedule(Protocol):
    """The rhythm of the rounds."""

    @property
    def deadline(self) -> float:
        """Seconds after which a job is given up: who has not answered is missing, and may be asked again."""
        ...

    @property
    def least(self) -> int:
        """Clients that must count for a step; a round with fewer changes nothing but its number."""
        ...

    @property
    def loses_answers(self) -> bool:
        """An answer may come to nothing: too late, or in a round with too few of them."""
        ...

    @property
    def takes_old(self) -> bool:
        """An answer may count that was made for older tensors than the server has."""
        ...

    @property
    def mixing(self) -> float | None:
        """Share of a fresh client's model in a step of one answer; None: changes are added."""
        ...

    def invite(self, draw: Callable[[int], tuple[int, ...]], busy: frozenset[int], seed: int) -> tuple[int, ...]:
        """Roster indices, ascending, none of them busy.

        Args:
            draw: The sampler: a seed to the clients of a round.
            busy: Clients that were asked and have not answered.
            seed: Of this round.
        """
        ...

    def enough(self, arrived: int) -> bool:
        """Whether the round ends with so many answers that count; the rest stay in flight."""
        ...

    def discount(self, age: int) -> float:
        """What an answer weighs whose job is so many server steps old, from 0 to 1; a job of discount 0 is given up."""
        ...


@runtime_checkable
class VirtualClock(Protocol):
    """What an engine also has whose time is not the world's: it can be set, so that a resumed run has its time back."""

    def set_time(self, seconds: float) -> None:
        """Let ``now()`` be this from here on."""
        ...
