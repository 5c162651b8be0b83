"""Fair aggregation: q-FFL and AFL reweight clients by their losses.

A mean over clients, or over a teacher's help to them, can rise while some sink. Two cures:

- **q-FFL**: clients count by the q-th power of their loss, with the step length that this allows:

      Δ = Σ F_k^q δ_k / Σ F_k^q (1 + q ‖δ_k‖² / (η F_k)),

  q = 0 is the uniform mean, a growing q leans towards the worst client. Stateless: an aggregator.
- **Agnostic** (min-max): the mean over clients under the worst mixture λ of them, which climbs their
  losses, λ ← Π(λ + γ F) with Π the nearest point of the simplex. λ lives from round to round in the
  server optimizer's state (:class:`MixtureAscent`), and :class:`MinMax` is the aggregator of one round;
  :mod:`lichen.algorithms.agnostic` joins the two.

F_k is what a client's message reports: its mean loss over the rows of its local steps. δ_k is what it sends.
Both are exact sums (:mod:`lichen.server.sums.fixed_point`). What a client adds follows from its own loss, norm and λ
alone, so the rules need sums only: under masks clients make these numbers themselves. MinMax then shows the server
each client's loss by name, as λ must, q-FFL shows it sums alone.

:func:`per_client_gain` says who gained: the number a mean hides.

References:
    Tian Li, Maziar Sanjabi, Ahmad Beirami and Virginia Smith. "Fair Resource Allocation in Federated
    Learning." ICLR 2020. https://arxiv.org/abs/1905.10497 (q-FedAvg)
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

from lichen.core import tree as trees
from lichen.core.contracts.server import ServerOptimizer
from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.mean import fitted
from lichen.server.sums import fixed_point
from lichen.server.sums.fixed_point import WEIGHT_BITS, FixedSum
from lichen.server.sums.lifted import Terms
from lichen.server.sums.summed import Summed, Weighting, weigh_C

__all__ = ["QFFL", "MinMax", "MixtureAscent", "PerClientGain", "per_client_gain", "simplex"]

_LEAST = 2.0**-WEIGHT_BITS


def _loss_C(message: Message, weight_C: Tensor) -> list[float]:
    """Each client's mean loss, 0 where its weight is 0.

    Raises:
        LichenError: if it is not there, or not a number.
    """
    if not {"loss_sum", "count"} <= message.metrics.keys():
        raise LichenError(
            "messages tell no loss to be fair by", where="aggregator.fair", fix="use a work that trains, such as Train"
        )
    loss_C = message.metrics["loss_sum"].cpu().double() / message.metrics["count"].cpu().double().clamp(min=1)
    losses = torch.where(weight_C > 0, loss_C, 0.0).tolist()
    for client, loss in zip(message.client_C.tolist(), losses, strict=True):
        if not 0 <= loss < math.inf:
            raise LichenError(f"its loss {loss} is not a finite number >= 0", where=f"message of client {client}")
    return [float(loss) for loss in losses]


def _nobody() -> LichenError:
    return LichenError("no client contributed", where="aggregator.fair", fix="invite more clients or skip the round")


@final
@dataclass(frozen=True, slots=True)
class QFFL(Summed):
    """q-FedAvg.

    Args:
        q: How much the loss counts, 0 or more; 0 is the mean, from 5 on only the worst are seen.
        lr: η, the clients' learning rate; 1/η stands for the Lipschitz constant of their gradients.
        weighting: What clients count before their loss: each 1 (``"uniform"``), or by examples.
        scale: Bits after the point of the exact sums.

    Raises:
        LichenError: if a number is out of range.
    """

    q: float
    _: KW_ONLY
    lr: float
    weighting: Weighting = "uniform"
    scale: int = 40
    one_version: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.q < math.inf:
            raise LichenError(f"{self.q} is out of range", where="aggregator.q", fix="use a number >= 0, such as 1")
        if not 0 < self.lr < math.inf:
            raise LichenError(f"{self.lr} is not positive", where="aggregator.lr", fix="give the clients' rate")
        if self.weighting not in ("examples", "uniform"):
            raise LichenError(
                f"unknown weighting {self.weighting!r}", where="aggregator.weighting", fix="use examples or uniform"
            )

    def zero(self) -> FixedSum:
        """Nothing folded in."""
        return FixedSum(scale=self.scale)

    def terms(self, message: Message, discount_C: Tensor | None) -> Iterator[Terms]:
        """Every client's tensors, weighed by its loss, and its part of the divisor.

        Raises:
            LichenError: if a loss is missing or not finite.
        """
        weight_C = weigh_C(message, self.weighting, discount_C)
        # A loss of 0 asks for nothing; a little more than that keeps its client in the sum.
        losses = [max(loss, 1e-6) for loss in _loss_C(message, weight_C)]
        factor_C = torch.tensor([loss**self.q for loss in losses], dtype=torch.float64)
        rounded_C = (weight_C * factor_C * 2.0**WEIGHT_BITS).round() * _LEAST
        fair_C = torch.where(weight_C > 0, rounded_C.clamp(min=_LEAST), 0.0)
        square_C = trees.norm_C({name: x.cpu().double() for name, x in message.tensors.items()}).square()
        curve_C = 1 + self.q * square_C / (self.lr * torch.tensor(losses, dtype=torch.float64))
        device = next(iter(message.tensors.values())).device
        weighted = {**message.tensors, "fair.curve": curve_C.to(device)}
        yield Terms(replace(message, tensors=weighted), fair_C)

    def close(self, total: FixedSum, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)``: Δ in the dtypes of ``shared``; metrics ``clients`` and ``curve``, the mean divisor.

        Raises:
            LichenError: if nothing was folded in, or a shape differs from that in ``shared``.
        """
        if not total.count:
            raise _nobody()
        sums = fixed_point.read_sums(total)
        divisor = float(sums.pop("fair.curve"))
        change = fitted({name: x / divisor for name, x in sums.items()}, shared.trainable)
        return Shared(change), {"clients": float(total.count), "curve": divisor / (total.weight / 2**WEIGHT_BITS)}


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
        losses = _loss_C(message, weight_C)
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
            raise _nobody()
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


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PerClientGain:
    """What a method, such as a teacher, did to each client's score.

    Attributes:
        gain_N: Score with it less score without, NaN where either is unknown.
        mean: Of the gains.
        least: The smallest gain.
        worst_decile: Mean score, with it, of the tenth of clients (at least one) with the lowest scores.
        worst_decile_before: The same of the scores without it.
        worse: Share of clients whose score fell.
    """

    gain_N: Tensor
    mean: float
    least: float
    worst_decile: float
    worst_decile_before: float
    worse: float


def per_client_gain(with_N: Tensor, without_N: Tensor) -> PerClientGain:
    """Who gained, where higher scores are better; give losses with their sign turned.

    Args:
        with_N: Each client's score with the method; NaN where it has none.
        without_N: Without it.

    Raises:
        LichenError: if no client has both scores.

    >>> gain = per_client_gain(torch.tensor([0.5, 0.9, 0.4]), torch.tensor([0.6, 0.5, 0.4]))
    >>> round(gain.mean, 3), round(gain.worse, 3), round(gain.worst_decile, 3)
    (0.1, 0.333, 0.4)
    """
    with_N, without_N = with_N.double(), without_N.double()
    gain_N = with_N - without_N
    known_N = ~gain_N.isnan()
    if not bool(known_N.any()):
        raise LichenError("no client has a score both with and without", where="gain", fix="evaluate both columns")
    tenth = max(1, int(known_N.sum()) // 10)

    def lowest(score_N: Tensor) -> float:
        return float(score_N[known_N].sort().values[:tenth].mean())

    return PerClientGain(
        gain_N=gain_N,
        mean=float(gain_N[known_N].mean()),
        least=float(gain_N[known_N].min()),
        worst_decile=lowest(with_N),
        worst_decile_before=lowest(without_N),
        worse=float((gain_N[known_N] < 0).double().mean()),
    )
