"""Standardises a series by its own beginning before a detector sees it: one threshold then suits losses of any scale.

The first numbers give a mean and a standard deviation, and are shown to nobody. All that follow are told as
``(x - mean) / deviation``, cut to ``limit`` deviations on either side, so that one odd row is no drift. After an alarm
the beginning is learned anew.

Legend: S numbers of a dumped state.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.server.drift.adwin import Adwin
from lichen.server.drift.detector import Detector, damaged
from lichen.server.drift.page_hinkley import PageHinkley

__all__ = ["DETECTORS", "Standardised", "detector_of"]

DetectorName = Literal["page-hinkley", "adwin"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StandardisedState:
    """How a series began, and the detector's state.

    Attributes:
        count: Numbers of the beginning so far.
        mean: Of them.
        squares: Sum of their squared deviations from it.
        inner: The detector's state.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    inner: Any


@final
@dataclass(frozen=True, slots=True)
class Standardised:
    """A detector around another.

    Args:
        inner: Sees the standardised numbers.
        beginning: How many numbers the mean and the deviation are of.
        limit: Deviations that a number may lie off.

    Raises:
        LichenError: if a number is out of range.
    """

    inner: Detector
    _: KW_ONLY
    beginning: int = 30
    limit: float = 3.0

    def __post_init__(self) -> None:
        if self.beginning < 2 or not 0 < self.limit < math.inf:
            raise LichenError(
                f"beginning {self.beginning} or limit {self.limit} is out of range",
                where="drift.standardised",
                fix="use a beginning of 2 or more, and a limit above 0",
            )

    @property
    def size(self) -> int:
        """Three numbers of the beginning, and the inner ones."""
        return 3 + self.inner.size

    def zero(self) -> StandardisedState:
        """Nothing seen."""
        return StandardisedState(inner=self.inner.zero())

    def update(self, state: StandardisedState, value: float) -> tuple[StandardisedState, bool]:
        """``(state, alarm)`` after one more number; one that is no number is left out."""
        if not math.isfinite(value):
            return state, False
        if state.count < self.beginning:
            count, off = state.count + 1, value - state.mean
            mean = state.mean + off / count
            squares = state.squares + off * (value - mean)
            return StandardisedState(count=count, mean=mean, squares=squares, inner=state.inner), False
        deviation = math.sqrt(state.squares / (state.count - 1))
        # Of a constant beginning there is no scale: what differs from it at all lies at the limit.
        off = (value - state.mean) / deviation if deviation > 0 else math.copysign(math.inf, value - state.mean)
        off = 0.0 if value == state.mean else min(max(off, -self.limit), self.limit)
        inner, alarm = self.inner.update(state.inner, off)
        if alarm:
            return self.zero(), True
        return StandardisedState(count=state.count, mean=state.mean, squares=state.squares, inner=inner), False

    def dump(self, state: StandardisedState) -> Tensor:
        """Float64 ``(S,)``."""
        own = torch.tensor([state.count, state.mean, state.squares], dtype=torch.float64)
        return torch.cat([own, self.inner.dump(state.inner)])

    def load(self, x_S: Tensor) -> StandardisedState:
        """Undo :meth:`dump`.

        Raises:
            LichenError: if this is no state.
        """
        if x_S.shape != (self.size,) or not bool(x_S[:3].isfinite().all()) or float(x_S[0]) not in range(2**20):
            raise damaged("a standardised detector")
        count, mean, squares = x_S[:3].tolist()
        return StandardisedState(count=int(count), mean=mean, squares=squares, inner=self.inner.load(x_S[3:]))


DETECTORS: dict[DetectorName, Detector] = {
    "page-hinkley": Standardised(PageHinkley(0.15)),
    "adwin": Standardised(Adwin()),
}
"""For losses, by the word of a recipe."""


def detector_of(name: DetectorName) -> Detector:
    """The detector of losses that a word of the recipe names.

    Raises:
        LichenError: if there is none of that name.
    """
    if name not in DETECTORS:
        raise LichenError(f"no detector {name!r}", where="stream.detect", fix=f"use one of {', '.join(DETECTORS)}")
    return DETECTORS[name]
