"""Sums the clients' vote histograms, adds noise once, and selects candidates.

The sum is exact and nothing but a sum, so it works under secure aggregation. When it is closed,
N(0, σ²) is added to each count, a single time whatever the number of clients. Everything after it
(threshold, chances, drawing or ranking) is post-processing, and costs no privacy.

The noise follows from a seed, so that a run can be repeated; whoever knows the seed can take it off again.
A deployment must therefore draw the seed from a cryptographic source and throw it away, or let the clients
add the noise (:class:`lichen.clients.statistics.nearest_vote.NearestNeighborHistogram`). Noise in floating point also
has gaps that a patient reader of low bits can exploit (Mironov 2012), so the result is rounded to 2^-20 votes.

References:
    Zinan Lin, Sivakanth Gopi, Janardhan Kulkarni, Harsha Nori and Sergey Yekhanin. "Differentially Private
    Synthetic Data via Foundation Model APIs 1: Images." ICLR 2024. https://arxiv.org/abs/2305.15560
    (noise, threshold, resampling)
    Chulin Xie, Zinan Lin, Arturs Backurs, Sivakanth Gopi, Da Yu, Huseyin A. Inan, Harsha Nori, Haotian
    Jiang, Huishuai Zhang, Yin Tat Lee, Bo Li and Sergey Yekhanin. "Differentially Private Synthetic Data
    via Foundation Model APIs 2: Text." ICML 2024. https://arxiv.org/abs/2403.01749 (rank)
    Ilya Mironov. "On Significance of the Least Significant Bits for Differential Privacy." CCS 2012.

Legend: C clients, M candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.seeds import torch_generator
from lichen.core.wire.shared import Shared
from lichen.server.sums import fixed_point
from lichen.server.sums.fixed_point import FixedSum
from lichen.server.sums.lifted import Terms
from lichen.server.sums.summed import Summed, weigh_C

__all__ = ["Votes", "concentration", "most_voted", "resample", "vote_probabilities"]

_FRACTION_BITS = 20  # bits after the point of a vote, and of the noise


@final
@dataclass(frozen=True, slots=True)
class Votes(Summed):
    """The noisy sum of the histograms of :class:`lichen.clients.statistics.nearest_vote.NearestNeighborHistogram`.

    Args:
        sigma: Standard deviation of the noise on each count, in votes; 0 for none.
        seed: Of the noise; a new one for every release, or two releases' difference has no noise at all.
        bits: Those of the votes.

    Raises:
        LichenError: if a number is out of range.
    """

    sigma: float = 0.0
    _: KW_ONLY
    seed: int = 0
    bits: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < math.inf:
            raise LichenError(f"noise of {self.sigma}", where="aggregator.votes.sigma", fix="use a finite number >= 0")
        if not 0 <= self.bits <= 16:
            raise LichenError(f"{self.bits} is out of range", where="aggregator.votes.bits", fix="use 0 to 16")

    def zero(self) -> FixedSum:
        """Nothing folded in."""
        return FixedSum(scale=_FRACTION_BITS)

    def terms(self, message: Message, discount_C: Tensor | None) -> Iterator[Terms]:
        """Every client's histogram; each counts 1.

        Raises:
            LichenError: if the tensors are no histogram, or come in another unit.
        """
        shapes = {name: tuple(x.shape[1:]) for name, x in message.tensors.items()}
        votes_CM = message.tensors.get("votes")
        if votes_CM is None or len(shapes) > 1 or votes_CM.dim() != 2 or votes_CM.is_floating_point():
            raise LichenError(
                f"expected votes (M) in whole numbers, got {shapes}",
                where="aggregator.votes",
                fix="pair Votes with the work Vote",
            )
        if message.group != f"votes/{votes_CM.shape[1]}/{self.bits}":
            raise LichenError(
                f"histograms {message.group!r} come in other units than 2^-{self.bits} votes",
                where="aggregator.votes.bits",
                fix="use the same bits in Vote and Votes",
            )
        yield Terms(message, weigh_C(message, "uniform", discount_C))

    def close(self, total: FixedSum, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``({"votes": (M,) float64}, metrics)``: the noisy counts, in votes.

        Metrics, all of noisy counts, are ``clients``, ``votes`` and ``concentration``.

        Raises:
            LichenError: if nothing was folded in.
        """
        if not total.count:
            raise LichenError("no client voted", where="aggregator.votes", fix="invite more clients")
        noisy_M = self.noisy(fixed_point.read_sums(total)["votes"] * 2.0**-self.bits)
        metrics = {"votes": float(noisy_M.sum()), "concentration": concentration(noisy_M)}
        return Shared({"votes": noisy_M}), {"clients": float(total.count), **metrics}

    def noisy(self, votes_M: Tensor) -> Tensor:
        """The counts with noise, float64; a release in which nobody came has its noise too."""
        votes_M = votes_M.double()
        if self.sigma:
            g = torch_generator(self.seed, "vote noise")
            votes_M = votes_M + self.sigma * torch.randn(votes_M.shape, generator=g, dtype=torch.float64)
        rounded_M: Tensor = (votes_M * 2**_FRACTION_BITS).round() * 2.0**-_FRACTION_BITS
        return rounded_M


def vote_probabilities(votes_M: Tensor, label_M: Tensor, *, threshold: float = 0.0) -> Tensor:
    """Chance of each candidate among those of its label: votes above the threshold, in proportion.

    Where no candidate of a label is above it, all of that label are equally likely.

    >>> vote_probabilities(torch.tensor([3.0, 1.0, -2.0, 0.5]), torch.tensor([0, 0, 1, 1]), threshold=1.0).tolist()
    [1.0, 0.0, 0.5, 0.5]
    """
    over_M = (votes_M.double() - threshold).clamp(min=0)
    chance_M = torch.zeros_like(over_M)
    for label in sorted(set(label_M.tolist())):
        mine_M = label_M == label
        some = over_M[mine_M]
        whole = float(some.sum())
        chance_M[mine_M] = some / whole if whole > 0 else torch.full_like(some, 1 / len(some))
    return chance_M


def resample(chance_M: Tensor, label_M: Tensor, counts: Mapping[int, int], seed: int) -> Tensor:
    """Places of ``counts[label]`` candidates of each label, drawn with replacement; int64, by label, ascending.

    Raises:
        LichenError: if a label has no candidate.
    """
    parts = []
    for label, count in sorted(counts.items()):
        place_m = _of(label, label_M)
        edge_m = chance_M[place_m].double().cumsum(0)
        coin_n = torch.rand(count, generator=torch_generator(seed, "resample", label), dtype=torch.float64)
        at_n = torch.searchsorted(edge_m, coin_n * edge_m[-1], right=True).clamp(max=len(place_m) - 1)
        # A coin on the very last edge must not fall on a candidate that has no chance.
        last = int((chance_M[place_m] > 0).nonzero()[-1])
        parts.append(place_m[at_n.clamp(max=last)].sort().values)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def most_voted(votes_M: Tensor, label_M: Tensor, counts: Mapping[int, int]) -> Tensor:
    """Places of the ``counts[label]`` most voted candidates of each label, of equals the first; int64, best first.

    Raises:
        LichenError: if a label has too few candidates.

    >>> most_voted(torch.tensor([1.0, 5.0, 5.0, 2.0]), torch.zeros(4, dtype=torch.int64), {0: 2}).tolist()
    [1, 2]
    """
    parts = []
    for label, count in sorted(counts.items()):
        place_m = _of(label, label_M)
        if len(place_m) < count:
            raise LichenError(
                f"{count} of {len(place_m)} candidates of label {label} cannot be chosen",
                where="votes",
                fix="write more candidates, or keep fewer",
            )
        parts.append(place_m[votes_M[place_m].sort(descending=True, stable=True).indices[:count]])
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def concentration(votes_M: Tensor) -> float:
    """Σ p² of the positive counts' shares p: 1 / M where all are equal, 1 where one has all; 0 without votes.

    >>> concentration(torch.tensor([2.0, 2.0, -9.0]))
    0.5
    """
    over_M = votes_M.double().clamp(min=0)
    whole = float(over_M.sum())
    return float((over_M / whole).square().sum()) if whole > 0 else 0.0


def _of(label: int, label_M: Tensor) -> Tensor:
    place_m = (label_M == label).nonzero()[:, 0]
    if not len(place_m):
        raise LichenError(f"no candidate has label {label}", where="votes", fix="write some of every label")
    return place_m
