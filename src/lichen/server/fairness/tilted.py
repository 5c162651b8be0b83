"""Tilted averages: clients count by the exponential of their loss, the more the larger the tilt.

    minimise  (1/t) log Σ p_k exp(t F_k(w)),   whose gradient weighs client k by  p_k exp(t F_k) / Σ p_j exp(t F_j)

A small tilt is the mean, a large one the worst client. F_k is what a client's message reports: its mean loss over the
rows of its local steps. An exponential of a loss has no bound, and an exact sum needs one; so losses are counted from a
level, the tilted loss of the round before, which the server keeps beside its optimizer's state (:class:`LevelKeeper`):
exp(t (F_k - level)). Nobody counts more than 2^10 times a client at the level, or less than a 2^10th. The first round
has no level: it is a plain mean.

References:
    Tian Li, Ahmad Beirami, Maziar Sanjabi and Virginia Smith. "Tilted Empirical Risk Minimization." ICLR 2021.
    https://arxiv.org/abs/2007.01162 (TERM; clients as groups, and the stochastic estimate of the denominator)

Legend: C clients of a message.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from lichen.core.contracts.server import ServerOptimizer
from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.fairness.losses import losses_of, nobody
from lichen.server.mean import fitted
from lichen.server.sums import fixed_point
from lichen.server.sums.fixed_point import WEIGHT_BITS, FixedSum
from lichen.server.sums.lifted import Terms
from lichen.server.sums.summed import Summed, Weighting, weigh_C

__all__ = ["LEVEL", "LevelKeeper", "TiltedMean"]

LEVEL = "fair.level"
"""The tilted loss of a round, in its change and in the optimizer's state; not-a-number before the first."""

_LEAST = 2.0**-WEIGHT_BITS
_MOST = math.log(2.0**10)
"""The exponent's ends."""


@final
@dataclass(frozen=True, slots=True)
class TiltedMean(Summed):
    """The mean of a round, tilted to large losses.

    The change also holds :data:`LEVEL`: :class:`LevelKeeper` takes it out.

    Args:
        tilt: t > 0.
        level: The tilted loss that losses are counted from; not-a-number: none is known, all count by p alone.
        weighting: p, what clients count before their loss: each 1 (``"uniform"``), or by examples.
        scale: Bits after the point of the exact sums.

    Raises:
        LichenError: if the tilt is not a positive number.
    """

    tilt: float
    _: KW_ONLY
    level: float = math.nan
    weighting: Weighting = "uniform"
    scale: int = 40
    one_version: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.tilt < math.inf:
            raise LichenError(
                f"{self.tilt} is not positive", where="aggregator.tilt", fix="use a number > 0, such as 1"
            )

    def zero(self) -> FixedSum:
        """Nothing folded in."""
        return FixedSum(scale=self.scale)

    def terms(self, message: Message, discount_C: Tensor | None) -> Iterator[Terms]:
        """Every client's tensors, weighed by its loss, and two numbers that are not.

        Raises:
            LichenError: if a loss is missing or not finite.
        """
        weight_C = weigh_C(message, self.weighting, discount_C)
        losses = losses_of(message, weight_C)
        factor_C = torch.tensor([self._factor(loss) for loss in losses], dtype=torch.float64)
        rounded_C = (weight_C * factor_C * 2.0**WEIGHT_BITS).round() * _LEAST
        tilted_C = torch.where(weight_C > 0, rounded_C.clamp(min=_LEAST), 0.0)
        device = next(iter(message.tensors.values())).device
        loss_C = torch.tensor(losses, dtype=torch.float64)
        # A sum weighs by the tilted weight, and these two are to be sums without it.
        plain = {"fair.plain": 1 / factor_C, "fair.loss": loss_C / factor_C}
        yield Terms(
            replace(message, tensors={**message.tensors, **{k: x.to(device) for k, x in plain.items()}}), tilted_C
        )

    def _factor(self, loss: float) -> float:
        """exp(t (F - level)), within its ends."""
        if math.isnan(self.level):
            return 1.0
        return math.exp(min(max(self.tilt * (loss - self.level), -_MOST), _MOST))

    def close(self, total: FixedSum, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)``: in the dtypes of ``shared``; metrics ``clients``, ``tilted`` and ``mean``, the losses.

        Raises:
            LichenError: if nothing was folded in, or a shape differs from that in ``shared``.
        """
        if not total.count:
            raise nobody()
        sums, tilted = fixed_point.read_sums(total), total.weight / 2**WEIGHT_BITS
        plain, mean = float(sums.pop("fair.plain")), float(sums.pop("fair.loss"))
        mean /= plain
        level = mean if math.isnan(self.level) else self.level + math.log(tilted / plain) / self.tilt
        change = fitted({name: x / tilted for name, x in sums.items()}, shared.trainable)
        metrics = {"clients": float(total.count), "tilted": level, "mean": mean}
        return Shared({**change, LEVEL: torch.tensor(level, dtype=torch.float64)}), metrics


@final
@dataclass(frozen=True, slots=True)
class LevelKeeper:
    """A server optimizer that also keeps the level of the last round; its state holds :data:`LEVEL`.

    Args:
        inner: Steps with the change.
    """

    inner: ServerOptimizer

    def init(self, shared: Shared) -> Tree:
        """The inner state, and no level."""
        return {**self.inner.init(shared), LEVEL: torch.tensor(math.nan, dtype=torch.float64)}

    def update(self, change: Shared, state: Tree, shared: Shared) -> tuple[Shared, Tree]:
        """``(shared, state)`` after one step."""
        step, before = dict(change.trainable), dict(state)
        level = step.pop(LEVEL)
        del before[LEVEL]
        new, after = self.inner.update(replace(change, trainable=step), before, shared)
        return new, {**after, LEVEL: level}
