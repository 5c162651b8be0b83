"""Rules that need only the distances between clients: each client gets a coefficient, and the change is their sum.

All work on the inner products G of the clients' rows (:mod:`lichen.server.robust.gram`): a point ``c X`` between the
rows is its coefficients c, its distance to row k is ``G_kk − 2 (G c)_k + cᵀ G c``. Ties go to the client of the lower
number.

    krum              the row with the least sum of squared distances to its n − f − 2 nearest others
    multi_krum        the mean of the n − f rows of the least such sums
    geometric_median  the point of the least sum of distances, by smoothed Weiszfeld steps from no change
    centred_clipping  from no change, steps by the mean of what rows lie off, each cut to a radius
    norm_bound        the mean of the rows, each cut to a radius; by default to the median norm of the round

Mixing with nearest neighbours goes before any rule: every row becomes the mean of the n − f rows nearest to it, itself
among them, which is a matrix W over rows, and the rule sees W G Wᵀ.

References:
    Peva Blanchard, El Mahdi El Mhamdi, Rachid Guerraoui and Julien Stainer. "Machine Learning with
    Adversaries: Byzantine Tolerant Gradient Descent." NeurIPS 2017. https://arxiv.org/abs/1703.02757
    Krishna Pillutla, Sham M. Kakade and Zaid Harchaoui. "Robust Aggregation for Federated Learning." IEEE
    Transactions on Signal Processing 2022. https://arxiv.org/abs/1912.13445 (RFA)
    Sai Praneeth Karimireddy, Lie He and Martin Jaggi. "Learning from History for Byzantine Robust
    Optimization." ICML 2021. https://arxiv.org/abs/2012.10333 (centred clipping)
    Ziteng Sun, Peter Kairouz, Ananda Theertha Suresh and H. Brendan McMahan. "Can You Really Backdoor
    Federated Learning?" 2019. https://arxiv.org/abs/1911.07963 (norm bounds)
    Youssef Allouah, Sadegh Farhadkhani, Rachid Guerraoui, Nirupam Gupta, Rafael Pinot and John Stephan.
    "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity." AISTATS 2023.
    https://arxiv.org/abs/2302.01772 (NNM)

Legend: C clients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lichen.server.robust.gram import distances_CC

__all__ = ["centred_clipping", "geometric_median", "krum", "mixing_CC", "multi_krum", "norm_bound", "scores_C"]


def scores_C(gram: Tensor, neighbours: int) -> Tensor:
    """For each row the sum of squared distances to so many nearest others."""
    distance = distances_CC(gram).fill_diagonal_(torch.inf)
    return distance.sort(1).values[:, :neighbours].sum(1)


def krum(gram: Tensor, liars: int) -> Tensor:
    """Krum's coefficients: 1 for one row."""
    best = scores_C(gram, len(gram) - liars - 2).sort(stable=True).indices[:1]
    return _mean_of(best, len(gram))


def multi_krum(gram: Tensor, liars: int) -> Tensor:
    """Multi-Krum's coefficients: alike for the n − f rows of the least scores, 0 for others."""
    best = scores_C(gram, len(gram) - liars - 2).sort(stable=True).indices[: len(gram) - liars]
    return _mean_of(best, len(gram))


def geometric_median(gram: Tensor, *, iterations: int, smoothing: float) -> Tensor:
    """The smoothed geometric median's coefficients.

    Args:
        gram: Inner products ``(C, C)``.
        iterations: Weiszfeld steps.
        smoothing: A distance below this counts as this.
    """
    coefficient_C = torch.zeros(len(gram), dtype=gram.dtype)
    for _ in range(iterations):
        pull_C = 1 / _distance_C(gram, coefficient_C).clamp(min=smoothing)
        coefficient_C = pull_C / pull_C.sum()
    return coefficient_C


def centred_clipping(gram: Tensor, *, radius: float, iterations: int) -> Tensor:
    """Centred clipping's coefficients.

    Args:
        gram: Inner products ``(C, C)``.
        radius: What a row lies off counts up to this norm.
        iterations: Steps.
    """
    coefficient_C = torch.zeros(len(gram), dtype=gram.dtype)
    for _ in range(iterations):
        factor_C = _shorten(_distance_C(gram, coefficient_C), radius)
        coefficient_C = coefficient_C * (1 - factor_C.mean()) + factor_C / len(gram)
    return coefficient_C


def norm_bound(gram: Tensor, *, radius: float | None) -> Tensor:
    """The coefficients of a mean of rows that are cut to a norm; without one, to the median of theirs."""
    norm_C = gram.diagonal().clamp(min=0).sqrt()
    bound = float(norm_C.quantile(0.5)) if radius is None else radius
    return _shorten(norm_C, bound) / len(gram)


def mixing_CC(gram: Tensor, liars: int) -> Tensor:
    """W of nearest-neighbour mixing: row k of ``W X`` is the mean of the n − f rows nearest to row k."""
    nearest = distances_CC(gram).sort(stable=True, dim=1).indices[:, : len(gram) - liars]
    return torch.zeros_like(gram).scatter_(1, nearest, 1 / (len(gram) - liars))


def _mean_of(chosen: Tensor, clients: int) -> Tensor:
    coefficient_C = torch.zeros(clients, dtype=torch.float64)
    coefficient_C[chosen] = 1 / len(chosen)
    return coefficient_C


def _distance_C(gram: Tensor, coefficient_C: Tensor) -> Tensor:
    """How far each row is from the point of these coefficients."""
    inner_C = gram @ coefficient_C
    return (gram.diagonal() - 2 * inner_C + coefficient_C @ inner_C).clamp(min=0).sqrt()


def _shorten(norm_C: Tensor, bound: float) -> Tensor:
    """The factors that bring each of these norms down to a bound."""
    return torch.where(norm_C > bound, bound / norm_C, 1.0)
