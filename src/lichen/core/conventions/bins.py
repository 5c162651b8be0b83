"""The bins that scores of clients are counted in, where the server learns sums alone: how many scored what, not who.

Bins are agreed on before anybody has a score, so that a histogram is a sum of one-hot vectors. A decile read from it is
wrong by half a bin at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

__all__ = ["Bins"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Bins:
    """Bins of equal width, or of equal ratio, from ``low`` to ``high``; what lies outside is in the last on its side.

    Attributes:
        low: Where the first begins.
        high: Where the last ends.
        count: How many.
        ratio: Each is as many times wider as its values are larger; ``low`` must be positive.
    """

    low: float
    high: float
    count: int
    ratio: bool = False

    def place(self, value: float) -> int:
        """The bin of a score; -1 of none (not-a-number).

        >>> Bins(low=0.0, high=1.0, count=10).place(0.25), Bins(low=0.0, high=1.0, count=10).place(7.0)
        (2, 9)
        """
        if math.isnan(value):
            return -1
        where = (self._scale(self.clamped(value)) - self._scale(self.low)) / self._step
        return min(int(where), self.count - 1)

    def clamped(self, value: float) -> float:
        """The score, or the end that it lies beyond."""
        return min(max(value, self.low), self.high)

    def middle(self, place: int) -> float:
        """The score that stands for all of a bin.

        >>> round(Bins(low=1.0, high=16.0, count=2, ratio=True).middle(0), 6)
        2.0
        """
        at = self._scale(self.low) + (place + 0.5) * self._step
        return math.exp(at) if self.ratio else at

    def worst(self, counts: Sequence[int], *, higher_is_better: bool) -> float:
        """Mean of the worst tenth of clients, at least one of them.

        Args:
            counts: Clients by bin; at least one client.
            higher_is_better: Which end is the worst.
        """
        tenth = left = max(1, sum(counts) // 10)
        total = 0.0
        for place in range(self.count) if higher_is_better else reversed(range(self.count)):
            here = min(left, counts[place])
            total, left = total + here * self.middle(place), left - here
        return total / tenth

    def deciles(self, counts: Sequence[int]) -> tuple[float, ...]:
        """The nine scores that part the clients into tenths, from the lowest.

        >>> Bins(low=0.0, high=10.0, count=10).deciles([1] * 10)
        (0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5)
        """
        each = [self.middle(place) for place, count in enumerate(counts) for _ in range(count)]
        return tuple(each[max(0, math.ceil(tenth * len(each) / 10) - 1)] for tenth in range(1, 10))

    def _scale(self, value: float) -> float:
        return math.log(value) if self.ratio else value

    @property
    def _step(self) -> float:
        return (self._scale(self.high) - self._scale(self.low)) / self.count
