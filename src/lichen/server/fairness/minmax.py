"""Agnostic (min-max) averages: the mean over clients under the worst mixture of them, which climbs their losses.

    λ ← Π(λ + γ F),   Π the nearest point of the simplex

λ lives from round to round in the server optimizer's state (:class:`MixtureAscent`), and :class:`MinMax` is the
aggregator of one round; :mod:`lichen.algorithms.agnostic` joins the two. F_k is what a client's message reports: its
mean loss over the rows of its local steps. The sums are exact, but the server sees each client's loss by name, as λ
must.

References:
    Mehryar Mohri, Gary Sivek and Ananda Theertha Suresh. "Agnostic Federated Learning." ICML 2019.
    https://arxiv.org/abs/1902.00146
    John Duchi, Shai Shalev-Shwartz, Yoram Singer and Tushar Chandra. "Efficient Projections onto the
    l1-Ball for Learning in High Dimensions." ICML 2008. https://doi.org/10.1145/1390156.1390191

Legend: C clients of a message, N clients of the roster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
from lichen.server.sums.fixed_point import FixedSum
from lichen.server.sums.lifted import Terms
from lichen.server.sums.summed import Summed, weigh_C

__all__ = ["MinMax", "MixtureAscent", "simplex"]


def simplex(v_N: Tensor) -> Tensor:
    """The nearest point with no number below 0 and a sum of 1.

    >>> simplex(torch.tensor([0.5, 0.75, -3.0])).tolist()
    [0.375, 0.625, 0.0]
    """
    sorted_N = v_N.sort(descending=True).values
    excess_N = (sorted_N.cumsum(0) - 1) / torch.arange(1, len(v_N) + 1, dtype=v_N.dtype)
    support = int((sorted_N > excess_N).sum())
    return (v_N - excess_N[support - 1]).clamp(min=0)


@final
@dataclass(frozen=True, slots=True)
class MinMax(Summed):
    """The mean under one mixture of clients, and everybody's loss beside it.

    The change also holds ``fair.loss`` ``(N,)``, NaN for clients that were not there: :class:`MixtureAscent` takes it
    out.

    Args:
        mixture: λ of every client of the roster; sums to 1.
        scale: Bits after the point of the exact sums.

    Raises:
        LichenError: if λ is no mixture.
    """

    mixture: Sequence[float]
    _: KW_ONLY
    scale: int = 40
    one_version: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.mixture or min(self.mixture) < 0 or abs(math.fsum(self.mixture) - 1) > 1e-6:
            raise LichenError("is no mixture", where="aggregator.mixture", fix="use numbers >= 0 that sum to 1")

    def zero(self) -> FixedSum:
        """Nothing folded in."""
        return FixedSum(scale=self.scale)

    def terms(self, message: Message, discount_C: Tensor | None) -> Iterator[Terms]:
        """Every client's tensors times its share, the share, and its loss in its own place.

        Raises:
            LichenError: if a client is not in the mixture, or a loss is missing or not finite.
        """
        clients, everyone = message.client_C.tolist(), len(self.mixture)
        if max(clients) >= everyone:
            raise LichenError(f"client {max(clients)} has no share in a mixture of {everyone}", where="aggregator.fair")
        weight_C = weigh_C(message, "uniform", discount_C)
        losses = losses_of(message, weight_C)
        device = next(iter(message.tensors.values())).device
        share_C = torch.tensor([self.mixture[c] * everyone for c in clients], dtype=torch.float64, device=device)
        # λ goes into the numbers, not into the weight: a client of share 0 must still tell its loss.
        weighted = {name: x.double() * share_C.view(-1, *[1] * (x.dim() - 1)) for name, x in message.tensors.items()}
        seen_CN = torch.nn.functional.one_hot(message.client_C.long().cpu(), everyone).double().to(device)
        loss_C1 = torch.tensor(losses, dtype=torch.float64, device=device)[:, None]
        weighted |= {"fair.loss": seen_CN * loss_C1, "fair.seen": seen_CN, "fair.share": share_C}
        yield Terms(replace(message, tensors=weighted), weight_C)

    def close(self, total: FixedSum, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)``: zeros where nobody of the mixture came.

        Metrics are ``clients``, ``worst`` (the highest loss) and ``share`` (the largest λ).

        Raises:
            LichenError: if nothing was folded in, or a shape differs from that in ``shared``.
        """
        if not total.count:
            raise nobody()
        sums = fixed_point.read_sums(total)
        share, seen_N = float(sums.pop("fair.share")), sums.pop("fair.seen")
        loss_N = torch.where(seen_N > 0, sums.pop("fair.loss") / seen_N, torch.nan)
        change = fitted(
            {name: x / share if share else torch.zeros_like(x) for name, x in sums.items()}, shared.trainable
        )
        worst = float(loss_N[seen_N > 0].max())
        metrics = {"clients": float(total.count), "worst": worst, "share": max(self.mixture)}
        return Shared({**change, "fair.loss": loss_N}), metrics


@final
@dataclass(frozen=True, slots=True)
class MixtureAscent:
    """A server optimizer that also lets λ climb the clients' losses; its state holds ``fair.mixture`` ``(N,)``.

    Args:
        inner: Steps with the change.
        clients: N.
        rate: γ, what one unit of loss adds to a client's λ before it is projected.

    Raises:
        LichenError: if a number is out of range.
    """

    inner: ServerOptimizer
    _: KW_ONLY
    clients: int
    rate: float

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise LichenError(f"{self.clients} clients", where="aggregator.fair", fix="give the roster's size")
        if not 0 < self.rate < math.inf:
            raise LichenError(
                f"{self.rate} is not positive", where="aggregator.rate", fix="use a number > 0, such as 0.1"
            )

    def init(self, shared: Shared) -> Tree:
        """Equal shares beside the inner state."""
        even_N = torch.full((self.clients,), 1 / self.clients, dtype=torch.float64)
        return {**self.inner.init(shared), "fair.mixture": even_N}

    def update(self, change: Shared, state: Tree, shared: Shared) -> tuple[Shared, Tree]:
        """``(shared, state)`` after one step and one climb; clients that were not there climb by nothing."""
        step, before = dict(change.trainable), dict(state)
        loss_N, mixture_N = step.pop("fair.loss"), before.pop("fair.mixture")
        new, after = self.inner.update(replace(change, trainable=step), before, shared)
        return new, {**after, "fair.mixture": simplex(mixture_N + self.rate * loss_N.nan_to_num(0.0))}
