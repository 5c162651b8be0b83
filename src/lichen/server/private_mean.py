"""The mean of clipped changes with noise in their sum, over a number of clients that is fixed beforehand.

    change = (Σ_k Δ_k + N(0, σ² C²)) / q N        ‖Δ_k‖ ≤ C

Every client that comes counts 1, and the denominator is the number of clients expected, not of those that came: what
one client moves is then C / qN at most, and who came shows in nothing but the sum. The sum is one of whole units
(:mod:`lichen.server.sums.fixed_point`) and so is the noise, so that the two add exactly. A round to which nobody comes
has noise all the same. Rounding to the grid moves a change by half a unit in each number, and a transform's clip lets
1 + 10^-6 of its norm pass: the noise is larger by ``1 + 4·10^-6``, which covers both.

References:
    H. Brendan McMahan, Daniel Ramage, Kunal Talwar and Li Zhang. "Learning Differentially Private Recurrent Language
    Models." ICLR 2018. https://arxiv.org/abs/1710.06963 (the estimator with a fixed denominator)
    Galen Andrew, Om Thakkar, H. Brendan McMahan and Swaroop Ramaswamy. "Differentially Private Learning with Adaptive
    Clipping." NeurIPS 2021. https://arxiv.org/abs/1905.03871 (noise in the sum)

Legend: C clients, N numbers of one client's message.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from math import prod
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.secret.randomness import GRID, Stream
from lichen.core.wire.shared import Shared
from lichen.server.mean import fitted
from lichen.server.sums import fixed_point, kernels
from lichen.server.sums.fixed_point import FixedSum, Layout
from lichen.server.sums.lifted import Terms
from lichen.server.sums.summed import Summed, weigh_C

__all__ = ["SLACK", "PrivateMean"]

SLACK = 4e-6
"""Of the noise: what covers rounding, and the slack of the clip."""


def _no_noise(sum_digest: str) -> Stream:
    raise LichenError("a private sum was to be closed without noise", where="privacy", fix="run it by its recipe")


@final
@dataclass(frozen=True, slots=True)
class PrivateMean(Summed):
    """The sum of the messages' tensors with noise, over a fixed number.

    Args:
        expected: q N, the clients expected in a round.
        clip: C, which each client's message keeps to.
        sigma: σ, the noise in units of the clip.
        layout: Names and shapes of the round's tensors, whether or not somebody comes.
        stream: Asked once when a sum is closed, with the sum's digest: the secret numbers of that sum alone. As they
            depend on it, equal sums have equal noise and unequal ones unrelated noise, and nobody can take two sums
            of one key and subtract the noise.
        distributed: The noise is in the messages already, a share of each client's; none is added here.

    Raises:
        LichenError: if a number is out of range, or the grid is too coarse for the clip.
    """

    expected: float = 1.0
    _: KW_ONLY
    clip: float = 1.0
    sigma: float = 1.0
    layout: Layout = ()
    stream: Callable[[str], Stream] = _no_noise
    distributed: bool = False

    def __post_init__(self) -> None:
        numbers = sum(prod(shape) for _, shape in self.layout)
        if not (0 < self.expected < math.inf and 0 < self.clip < math.inf and 0 <= self.sigma < math.inf):
            raise LichenError("a private mean needs clients, a clip and noise", where="privacy", fix="set them above 0")
        if math.sqrt(numbers) * 2.0 ** -(GRID + 1) > self.clip * 1e-6:
            raise LichenError(
                f"a clip of {self.clip:g} is too small for {numbers:,} numbers with {GRID} bits after the point",
                where="privacy.clip",
                fix="raise it",
            )

    def zero(self) -> FixedSum:
        """Nothing folded in."""
        return FixedSum(scale=GRID)

    def terms(self, message: Message, discount_C: Tensor | None) -> Iterator[Terms]:
        """Every tensor of each client that has not failed, once; late ones may be discounted, which moves less."""
        yield Terms(message, weigh_C(message, "uniform", discount_C))

    def close(self, total: FixedSum, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)``; the only metric is ``noise``, its standard deviation in one number of the change.

        Raises:
            LichenError: if messages had another layout, or the sum leaves its range.
        """
        sizes = [prod(shape) for _, shape in self.layout]
        if total.units_N is None:
            units_N = torch.zeros(sum(sizes), dtype=torch.int64)
        else:
            fixed_point.check_alike((None, total.layout), (None, self.layout))
            units_N = total.units_N.cpu()
        deviation = self.sigma * self.clip * (1 + SLACK)
        noise_N, most = torch.zeros_like(units_N), 0
        if not self.distributed:
            stream = self.stream(hashlib.sha256(units_N.numpy().tobytes()).hexdigest())
            noise_N = stream.units(len(units_N), deviation)
            most = int(noise_N.abs().amax()) if len(noise_N) else 0
        fixed_point.check_range(min(total.bound, kernels.LIMIT) + most, GRID)
        parts = torch.split((units_N + noise_N).double() * 2.0**-GRID / self.expected, sizes)
        change = {name: part.view(shape) for (name, shape), part in zip(self.layout, parts, strict=True)}
        return Shared(fitted(change, shared.trainable)), {"noise": deviation / self.expected}
