"""Lies of one client by itself: a change turned round, noise on it, a weight too large, no work at all.

With Δ a client's change, d the numbers in it and n its weight, a liar sends

==============  ==================================================
sign_flip       −c Δ
noise           Δ + σ ‖Δ‖ / √d · N(0, 1)
weight          Δ, and weighs c n, as far as admission lets it
free_ride       0, or s / √d · N(0, 1), and weighs n
==============  ==================================================

A free rider has learned nothing and claims its rows; noise hides that two of its changes are alike. Here it trains as
everybody does, and throws it away: what is simulated is what the server gets, not what the rider saves.

References:
    Liping Li, Wei Xu, Tianyi Chen, Georgios B. Giannakis and Qing Ling. "RSA: Byzantine-Robust Stochastic Aggregation
    Methods for Distributed Learning from Heterogeneous Datasets." AAAI 2019. https://arxiv.org/abs/1811.03761
    (sign flipping, their Section 5)
    Peva Blanchard, El Mahdi El Mhamdi, Rachid Guerraoui and Julien Stainer. "Machine Learning with Adversaries:
    Byzantine Tolerant Gradient Descent." NIPS 2017. https://arxiv.org/abs/1703.02757 (Gaussian workers)
    Jierui Lin, Min Du and Jian Liu. "Free-riders in Federated Learning: Attacks and Defenses." 2019.
    https://arxiv.org/abs/1911.12560
    Yann Fraboni, Richard Vidal and Marco Lorenzi. "Free-rider Attacks on Model Aggregation in Federated Learning."
    AISTATS 2021. https://arxiv.org/abs/2006.11901 (plain and disguised)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch

from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree

__all__ = ["FreeRide", "Noise", "SignFlip", "Weight"]


def _normal(like: Tree, seed: int, client: int) -> Tree:
    """Standard normal numbers of these shapes, by the round and the client alone."""
    generator = torch_generator(seed, client, "lie")
    return {name: torch.randn(x.shape, generator=generator).to(x) for name, x in sorted(like.items())}


def _count(delta: Tree) -> int:
    return max(sum(x.numel() for x in delta.values()), 1)


@final
@dataclass(frozen=True, slots=True)
class SignFlip:
    """−c Δ.

    Args:
        scale: c.
    """

    scale: float

    def lie(self, delta: Tree, weight: float, *, client: int, seed: int, most: float) -> tuple[Tree, float]:
        """Its change turned round, and its weight."""
        return {name: -self.scale * x for name, x in delta.items()}, weight


@final
@dataclass(frozen=True, slots=True)
class Noise:
    """Δ + σ ‖Δ‖ / √d · N(0, 1): the noise's norm is about σ times the change's.

    Args:
        scale: σ.
    """

    scale: float

    def lie(self, delta: Tree, weight: float, *, client: int, seed: int, most: float) -> tuple[Tree, float]:
        """Its change with noise on it, and its weight."""
        norm = math.sqrt(sum(float(x.double().square().sum()) for _, x in sorted(delta.items())))
        deviation = self.scale * norm / math.sqrt(_count(delta))
        return {name: delta[name] + deviation * x for name, x in _normal(delta, seed, client).items()}, weight


@final
@dataclass(frozen=True, slots=True)
class Weight:
    """Its change, weighing c times what it should, but no more than passes admission.

    Args:
        scale: c.
        most: What the roster lets each liar weigh at most; nothing limits others.
    """

    scale: float
    most: Mapping[int, float]

    def lie(self, delta: Tree, weight: float, *, client: int, seed: int, most: float) -> tuple[Tree, float]:
        """Its change as it is, and a larger weight."""
        allowed = min(most, self.most.get(client, math.inf))
        return delta, max(weight, min(self.scale * weight, allowed))


@final
@dataclass(frozen=True, slots=True)
class FreeRide:
    """Zeros, or noise of a norm of its own, in the name of its rows.

    Args:
        scale: About the norm of what it sends.
    """

    scale: float

    def lie(self, delta: Tree, weight: float, *, client: int, seed: int, most: float) -> tuple[Tree, float]:
        """Nothing that it has learned, and its weight."""
        if not self.scale:
            return {name: torch.zeros_like(x) for name, x in delta.items()}, weight
        deviation = self.scale / math.sqrt(_count(delta))
        return {name: deviation * x for name, x in _normal(delta, seed, client).items()}, weight
