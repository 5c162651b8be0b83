"""Page-Hinkley: sums how far a series lies above its mean, and alarms when the sum has risen far above its least.

    m_t = α m_{t-1} + (x_t - x̄_t - δ),   alarm where m_t - min m > λ

x̄_t is the mean of all numbers so far. The same with the signs turned watches for a fall. δ is what is let pass, λ what
is not, both in the units of the series: λ = 50 is meant for errors of 0 and 1, so that losses are standardised before
(:mod:`lichen.server.drift.standardised`).

References:
    E. S. Page. "Continuous Inspection Schemes." Biometrika 41(1/2), 1954, 100-115.
    https://doi.org/10.1093/biomet/41.1-2.100
    João Gama, Indrė Žliobaitė, Albert Bifet, Mykola Pechenizkiy and Abdelhamid Bouchachia. "A Survey on Concept Drift
    Adaptation." ACM Computing Surveys 46(4), 2014. https://doi.org/10.1145/2523813

Legend: S numbers of a dumped state.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.server.drift.detector import Direction, damaged

__all__ = ["PageHinkley"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PageHinkleyState:
    """What is known of a series.

    Attributes:
        count: Numbers since the beginning, or since the last alarm.
        mean: Of them.
        rise: The sum that grows where they rise.
        least: The least it was.
        fall: The sum that shrinks where they fall.
        most: The most it was.
    """

    count: int = 0
    mean: float = 0.0
    rise: float = 0.0
    least: float = math.inf
    fall: float = 0.0
    most: float = -math.inf


@final
@dataclass(frozen=True, slots=True)
class PageHinkley:
    """The detector.

    Args:
        delta: δ ≥ 0.
        threshold: λ > 0.
        alpha: α, above 0 and at most 1: how much of the sum is left after a step.
        minimum: Numbers before the first alarm.
        direction: Which way the mean must go.

    Raises:
        LichenError: if a number is out of range.

    >>> from lichen.server.drift.detector import watch
    >>> watch(PageHinkley(threshold=5.0), [0.0] * 40 + [1.0] * 40)[1]
    [45]
    """

    delta: float = 0.005
    _: KW_ONLY
    threshold: float = 50.0
    alpha: float = 1 - 1e-4
    minimum: int = 30
    direction: Direction = "up"

    def __post_init__(self) -> None:
        if not (0 <= self.delta < math.inf and 0 < self.threshold < math.inf and 0 < self.alpha <= 1):
            raise LichenError(
                f"delta {self.delta}, threshold {self.threshold} and alpha {self.alpha} are out of range",
                where="drift.page-hinkley",
                fix="use delta of 0 or more, threshold above 0, alpha above 0 and at most 1",
            )

    @property
    def size(self) -> int:
        """The six numbers of a state."""
        return 6

    def zero(self) -> PageHinkleyState:
        """Nothing seen."""
        return PageHinkleyState()

    def update(self, state: PageHinkleyState, value: float) -> tuple[PageHinkleyState, bool]:
        """``(state, alarm)`` after one more number."""
        count = state.count + 1
        mean = state.mean + (value - state.mean) / count
        rise = self.alpha * state.rise + value - mean - self.delta
        fall = self.alpha * state.fall + value - mean + self.delta
        least, most = min(state.least, rise), max(state.most, fall)
        up = self.direction != "down" and rise - least > self.threshold
        down = self.direction != "up" and most - fall > self.threshold
        if count >= self.minimum and (up or down):
            return PageHinkleyState(), True
        return PageHinkleyState(count=count, mean=mean, rise=rise, least=least, fall=fall, most=most), False

    def dump(self, state: PageHinkleyState) -> Tensor:
        """Float64 ``(S,)``."""
        numbers = [state.count, state.mean, state.rise, state.least, state.fall, state.most]
        return torch.tensor(numbers, dtype=torch.float64)

    def load(self, x_S: Tensor) -> PageHinkleyState:
        """Undo :meth:`dump`.

        Raises:
            LichenError: if this is no state.
        """
        if x_S.shape != (self.size,) or bool(x_S.isnan().any()) or not 0 <= float(x_S[0]) < 2**53:
            raise damaged("Page-Hinkley")
        count, mean, rise, least, fall, most = x_S.tolist()
        return PageHinkleyState(count=int(count), mean=mean, rise=rise, least=least, fall=fall, most=most)
