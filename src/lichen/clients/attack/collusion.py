"""Lies of clients that know all honest messages of their round: the strongest that a defence can be tested with.

With μ and σ the mean and the standard deviation of the honest changes Δ_i, number by number and all of one weight, n
clients of which m lie, and Φ the normal distribution, all liars of a round send the same:

==========  ===========================================================================================
alie        μ − z σ,    z = Φ⁻¹((n − m − s) / (n − m)),   s = ⌊n / 2 + 1⌋ − m honest ones still to win over
ipm         −ε μ
min_max     μ + γ p,    the largest γ with max_i ‖μ + γ p − Δ_i‖ ≤ max_ij ‖Δ_i − Δ_j‖
==========  ===========================================================================================

In min_max p is −σ, −μ or −sign(μ). The papers search for γ by halving; here each Δ_i gives a quadratic equation, whose
root is exact. The length of p does not matter, since γ makes up for it.

References:
    Gilad Baruch, Moran Baruch and Yoav Goldberg. "A Little Is Enough: Circumventing Defenses For Distributed
    Learning." NeurIPS 2019. https://arxiv.org/abs/1902.06156
    Cong Xie, Oluwasanmi Koyejo and Indranil Gupta. "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product
    Manipulation." UAI 2019. https://arxiv.org/abs/1903.03936
    Virat Shejwalkar and Amir Houmansadr. "Manipulating the Byzantine: Optimizing Model Poisoning Attacks and Defenses
    for Federated Learning." NDSS 2021.

Legend: H honest clients.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, Protocol, final

import torch
from torch import Tensor

from lichen.core.tree import Tree

__all__ = ["Alie", "Collusion", "Deviation", "InnerProduct", "MinMax", "quantile"]

Deviation = Literal["std", "unit", "sign"]
"""What min_max moves along: the standard deviation, the mean, or its signs; each turned round."""


class Collusion(Protocol):
    """What all liars of a round send, made of what the honest clients send."""

    def crafted(self, honest_H: Tree, liars: int) -> Tree:
        """One change, without client axis.

        Args:
            honest_H: The honest changes, ``(H, ...)``, H ≥ 1.
            liars: How many lie in this round.
        """
        ...


def _mean(x_H: Tensor) -> Tensor:
    return x_H.double().mean(0)


def _std(x_H: Tensor) -> Tensor:
    return x_H.double().std(0, correction=0)


def quantile(clients: int, liars: int) -> float:
    """ALIE's z for so many clients of a round, of which so many lie.

    At or below 0 there are so few liars that μ − z σ is no lie. Where liars are most of all, one honest client is still
    to be won over.

    >>> round(quantile(50, 12), 3), quantile(10, 2)
    (0.336, 0.0)
    """
    honest = clients - liars
    supporters = min(max(clients // 2 + 1 - liars, 1), honest)
    share = (honest - supporters) / honest
    return NormalDist().inv_cdf(share) if share > 0 else float("-inf")


@final
@dataclass(frozen=True, slots=True)
class Alie:
    """μ − z σ.

    Args:
        scale: z; None: by how many lie in a round, at least 0.
    """

    scale: float | None = None

    def crafted(self, honest_H: Tree, liars: int) -> Tree:
        """A little off the mean, where many an honest client is as well."""
        honest = len(next(iter(honest_H.values())))
        z = max(quantile(honest + liars, liars), 0.0) if self.scale is None else self.scale
        return {name: (_mean(x_H) - z * _std(x_H)).to(x_H) for name, x_H in honest_H.items()}


@final
@dataclass(frozen=True, slots=True)
class InnerProduct:
    """−ε μ.

    Args:
        scale: ε.
    """

    scale: float

    def crafted(self, honest_H: Tree, liars: int) -> Tree:
        """Against the mean, so that the inner product of both falls."""
        return {name: (-self.scale * _mean(x_H)).to(x_H) for name, x_H in honest_H.items()}


@final
@dataclass(frozen=True, slots=True)
class MinMax:
    """μ + γ p, no further from an honest change than honest ones are from each other.

    Args:
        deviation: What p is.
    """

    deviation: Deviation = "std"

    def crafted(self, honest_H: Tree, liars: int) -> Tree:
        """As far from the mean as the spread of the honest changes hides it."""
        first = next(iter(honest_H.values()))
        a_H = b_H = torch.zeros(len(first), dtype=torch.float64, device=first.device)
        length, apart_HH = torch.zeros((), dtype=torch.float64, device=first.device), torch.zeros(1)
        for _, x_H in sorted(honest_H.items()):
            flat_H, along = x_H.double().flatten(1), self._along(x_H).flatten()
            off_H = flat_H.mean(0) - flat_H
            a_H, b_H, length = a_H + off_H.square().sum(1), b_H + off_H @ along, length + along @ along
            near_HH = torch.cdist(flat_H, flat_H, compute_mode="donot_use_mm_for_euclid_dist").square()
            apart_HH = apart_HH.to(near_HH) + near_HH
        slack_H = (apart_HH.max() - a_H).clamp(min=0)
        gamma = ((b_H.square() + length * slack_H).sqrt() - b_H).min() / length if length > 0 else length
        return {name: (_mean(x_H) + gamma * self._along(x_H)).to(x_H) for name, x_H in honest_H.items()}

    def _along(self, x_H: Tensor) -> Tensor:
        if self.deviation == "std":
            return -_std(x_H)
        mean = _mean(x_H)
        return -mean if self.deviation == "unit" else -mean.sign()
