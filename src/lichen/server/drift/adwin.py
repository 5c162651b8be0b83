"""ADWIN: a window over a series that grows while its mean holds, and drops its oldest part where the mean has changed.

The window is cut in two at any of its places. Where the means of the parts, of n₀ and n₁ numbers, differ by more than

    ε = √(2/m σ² L) + 2/(3m) L,   1/m = 1/(n₀ - w + 1) + 1/(n₁ - w + 1),   L = ln(2 ln(n)/δ)

there is a change, and the oldest bucket goes, until no cut shows one. σ² is the variance of the window of n numbers, w
the least length of a part. Not all numbers are retained, but buckets of 1, 2, 4, ... numbers, with sum and squared
deviations: five of a size at most, then the two oldest become one of twice the size.

References:
    Albert Bifet and Ricard Gavaldà. "Learning from Time-Changing Data with Adaptive Windowing." SIAM International
    Conference on Data Mining 2007, 443-448. https://doi.org/10.1137/1.9781611972771.42
    Brian Babcock, Mayur Datar, Rajeev Motwani and Liadan O'Callaghan. "Maintaining Variance and k-Medians over Data
    Stream Windows." PODS 2003. https://doi.org/10.1145/773153.773176

Legend: S numbers of a dumped state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.server.drift.detector import Direction, damaged

__all__ = ["Adwin"]

_SIZES = 40
"""Sizes of buckets, from 1 to 2^39 numbers."""

Bucket = tuple[float, float]
"""Sum, and squared deviations from the mean."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AdwinState:
    """A window.

    Attributes:
        seen: Numbers since the beginning, or since the last alarm.
        rows: Buckets of ``2^i`` numbers at place i, the oldest first.
    """

    seen: int = 0
    rows: tuple[tuple[Bucket, ...], ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Adwin:
    """The detector.

    Args:
        delta: δ, above 0 and below 1: the chance of a false alarm that a look is allowed.
        every: Numbers from one look to the next.
        buckets: Of one size, at most.
        part: w, the least length of either part.
        grace: Numbers that the window must have more than to be looked at.
        direction: Which way the mean must go for an alarm; the window forgets its oldest part either way.

    Raises:
        LichenError: if a number is out of range.

    >>> from lichen.server.drift.detector import watch
    >>> watch(Adwin(), [0.0, 1.0] * 100 + [5.0, 6.0] * 100)[1]
    [223]
    """

    delta: float = 0.002
    _: KW_ONLY
    every: int = 32
    buckets: int = 5
    part: int = 5
    grace: int = 10
    direction: Direction = "up"

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1 or min(self.every, self.part) < 1 or self.buckets < 2 or self.grace < 1:
            raise LichenError(
                f"delta {self.delta}, every {self.every}, buckets {self.buckets}, part {self.part} or grace "
                f"{self.grace} is out of range",
                where="drift.adwin",
                fix="use a delta between 0 and 1, 2 buckets or more, and 1 or more of the others",
            )

    @property
    def size(self) -> int:
        """How many numbers were seen, and for every size of buckets their number, sums and deviations."""
        return 1 + _SIZES * (1 + 2 * self.buckets)

    def zero(self) -> AdwinState:
        """Nothing seen."""
        return AdwinState()

    def update(self, state: AdwinState, value: float) -> tuple[AdwinState, bool]:
        """``(state, alarm)`` after one more number."""
        seen, rows = state.seen + 1, self._with(state.rows, value)
        changed = False
        if seen % self.every == 0:
            while change := self._change(rows):
                changed = changed or self.direction == "both" or (change > 0) == (self.direction == "up")
                rows = _without_oldest(rows)
        return (AdwinState(), True) if changed else (AdwinState(seen=seen, rows=rows), False)

    def _with(self, rows: tuple[tuple[Bucket, ...], ...], value: float) -> tuple[tuple[Bucket, ...], ...]:
        """The window with one number more."""
        new, incoming = list(rows), (value, 0.0)
        for i in range(len(rows) + 1):
            if i == len(new):
                new.append(())
            row = (*new[i], incoming)
            if len(row) <= self.buckets:
                new[i] = row
                break
            new[i], incoming = row[2:], _joined(row[0], 2**i, row[1], 2**i)
        return tuple(new)

    def _change(self, rows: tuple[tuple[Bucket, ...], ...]) -> float:
        """How far the mean rose at the first cut, from the oldest on, that shows a change; 0 where none does."""
        n, total, spread = 0, 0.0, 0.0
        for more, (some, deviations) in _oldest_first(rows):
            total, spread = _joined((total, spread), n, (some, deviations), more) if n else (some, deviations)
            n += more
        if n <= self.grace:
            return 0.0
        bits = math.log(2 * math.log(n) / self.delta)
        n_0, total_0 = 0, 0.0
        for more, (some, _) in _oldest_first(rows):
            n_0, total_0 = n_0 + more, total_0 + some
            n_1 = n - n_0
            if n_1 < self.part:
                break
            if n_0 >= self.part:
                per_m = 1 / (n_0 - self.part + 1) + 1 / (n_1 - self.part + 1)
                rise = (total - total_0) / n_1 - total_0 / n_0
                if abs(rise) > math.sqrt(2 * per_m * spread / n * bits) + 2 / 3 * bits * per_m:
                    return rise
        return 0.0

    def dump(self, state: AdwinState) -> Tensor:
        """Float64 ``(S,)``."""
        out = torch.zeros(_SIZES, 1 + 2 * self.buckets, dtype=torch.float64)
        for i, row in enumerate(state.rows):
            out[i, 0] = len(row)
            out[i, 1 : 1 + 2 * len(row)] = torch.tensor([x for bucket in row for x in bucket], dtype=torch.float64)
        return torch.cat([torch.tensor([state.seen], dtype=torch.float64), out.flatten()])

    def load(self, x_S: Tensor) -> AdwinState:
        """Undo :meth:`dump`.

        Raises:
            LichenError: if this is no state.
        """
        if x_S.shape != (self.size,) or not bool(x_S.isfinite().all()) or not 0 <= float(x_S[0]) < 2**53:
            raise damaged("ADWIN")
        table = x_S[1:].view(_SIZES, -1).tolist()
        if not all(line[0] in range(self.buckets + 1) for line in table):
            raise damaged("ADWIN")
        rows = [tuple((line[1 + 2 * k], line[2 + 2 * k]) for k in range(int(line[0]))) for line in table]
        while rows and not rows[-1]:
            rows.pop()
        return AdwinState(seen=int(x_S[0]), rows=tuple(rows))


def _joined(a: Bucket, n_a: int, b: Bucket, n_b: int) -> Bucket:
    """Two buckets of so many numbers as one."""
    apart = a[0] / n_a - b[0] / n_b
    return a[0] + b[0], a[1] + b[1] + n_a * n_b / (n_a + n_b) * apart * apart


def _oldest_first(rows: tuple[tuple[Bucket, ...], ...]) -> Iterator[tuple[int, Bucket]]:
    for i in range(len(rows) - 1, -1, -1):
        for bucket in rows[i]:
            yield 2**i, bucket


def _without_oldest(rows: tuple[tuple[Bucket, ...], ...]) -> tuple[tuple[Bucket, ...], ...]:
    *rest, last = rows
    shorter = (*rest, last[1:])
    while shorter and not shorter[-1]:
        shorter = shorter[:-1]
    return shorter
