"""FlexLoRA and FLoRIST: the mean product's truncated SVD becomes the shared adapter.

    U S V = Σ p_k B_k A_k,    B ← U √S,    A ← √S V    (the first r directions, strongest first)

Clients may have any ranks, and one of rank r_k that takes the first r_k directions has the best adapter
of its rank. What lies beyond rank r is cut off, and told. FlexLoRA defines it by the product of full size;
as FLoRIST does, that is never made while the stacked factors are smaller: a thin QR of each and the SVD of
the small core give the same, in float64, and memory is the clients' pairs.

FLoRIST keeps only the fewest directions that hold a share of the squared singular values. A direction that
is dropped, or carried nothing, gets B = 0 and a fresh A, so that it adds nothing and can still learn; at
zero in both halves it would have no gradient for ever.

References:
    Jiamu Bai, Daoyuan Chen, Bingchen Qian, Liuyi Yao and Yaliang Li. "Federated Fine-tuning of Large
    Language Models under Heterogeneous Tasks and Client Resources." NeurIPS 2024.
    https://arxiv.org/abs/2402.11505 (FlexLoRA)
    Hariharan Ramesh and Jyotikrishna Dass. "FLoRIST: Singular Value Thresholding for Efficient and
    Accurate Federated Fine-Tuning of Large Language Models." 2025. https://arxiv.org/abs/2506.09199
    Carl Eckart and Gale Young. "The approximation of one matrix by another of lower rank."
    Psychometrika 1(3), 1936.

Legend: m rows of a layer's weight (out), n columns (in), r adapter rank, S singular values.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core.conventions.factor_pairs import factor_names
from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.lowrank.adapters import AdapterMeansList, initial_A, rounding_floor
from lichen.server.lowrank.factors import directions, gap_square, halves
from lichen.server.lowrank.lowrank import LowRank
from lichen.server.sums.summed import Weighting

__all__ = ["FLoRIST", "FlexLoRA", "fewest"]


@final
@dataclass(frozen=True, slots=True)
class Redistributed:
    """The rule that writes the best factors of the mean product over the shared adapter.

    Args:
        energy: Share of a layer's squared singular values to keep, in (0, 1]; None: all that fit the rank.
        seed: Of the fresh rows of A, together with the newest version among the answers.

    Raises:
        LichenError: if the energy is out of range.
    """

    energy: float | None = None
    _: KW_ONLY
    seed: int = 0
    whole = False
    one_version = True

    def __post_init__(self) -> None:
        if self.energy is not None and not 0 < self.energy <= 1:
            raise LichenError(
                f"{self.energy} is out of range", where="aggregator.florist.energy", fix="use 0 < energy <= 1"
            )

    def __call__(self, adapters: AdapterMeansList, change: Tree) -> tuple[Shared, dict[str, float]]:
        """``(new halves, metrics)``; see :func:`FlexLoRA`."""
        written: Tree = {}
        apart = lost = size = 0.0
        ranks: list[int] = []
        for adapter in adapters:
            name, stack = adapter.name, adapter.stack()
            U, sigma, V = directions(stack)
            square = float(sigma.square().sum())
            floor = rounding_floor(adapters.dtype(name)) * math.sqrt(square)
            keep = min(adapter.A_rn.shape[0], int((sigma > floor).sum()))
            if self.energy is not None:
                keep = min(keep, fewest(sigma, self.energy))
            A_rn = initial_A(adapter.A_rn, name, seed=self.seed, version=adapters.version)
            B_mr = torch.zeros_like(adapter.B_mr)
            B_mr[:, :keep], A_rn[:keep] = halves(U, sigma, V, keep)
            name_A, name_B = factor_names(name)
            written[name_A], written[name_B] = A_rn - adapter.A_rn, B_mr - adapter.B_mr
            apart += gap_square(stack, square, (adapter.meanB_mr, adapter.meanA_rn))
            lost, size, ranks = lost + float(sigma[keep:].square().sum()), size + square, [*ranks, keep]
        metrics = {"deviation": apart, "lost": lost}
        shares = {name: math.sqrt(x / size) if size else 0.0 for name, x in metrics.items()}
        return Shared(written), {**shares, "rank": sum(ranks) / max(1, len(ranks))}


def fewest(sigma: Tensor, energy: float) -> int:
    """How many of the falling singular values hold this share of all their squares.

    >>> fewest(torch.tensor([2.0, 1.0, 1.0]), 0.8), fewest(torch.tensor([2.0, 1.0, 0.0]), 1.0)
    (2, 2)
    """
    square = sigma.double().square()
    # What is left out, summed from its small end: at share 1 it must be nothing at all.
    left_out = torch.cat([square.flip(0).cumsum(0).flip(0), square.new_zeros(1)])
    return int((left_out > (1 - energy) * float(left_out[0])).sum())


def FlexLoRA(weighting: Weighting = "examples", *, seed: int = 0) -> LowRank:
    """The best factors of the shared rank of ``Σ p_k B_k A_k``, balanced, strongest direction first.

    The new halves are written as what turns the old ones into them, so the server optimizer must add
    the change as it is (SGD at rate 1). The model's factor on ``B A`` is one for all ranks and plays no
    part. Metrics: ``rank``, directions kept, a layer; ``lost``, the norm cut off over that of the mean
    products; ``deviation``, what averaging A and B would have lost.

    Args:
        weighting: As in :class:`lichen.server.mean.Mean`.
        seed: Of the fresh rows of A for directions that carry nothing.
    """
    return LowRank(weighting, rule=Redistributed(seed=seed))


def FLoRIST(energy: float, *, weighting: Weighting = "examples", seed: int = 0) -> LowRank:
    """:func:`FlexLoRA` that keeps, of each layer, only the fewest directions with a share of the energy.

    Args:
        energy: τ, share of the squared singular values, in (0, 1].
        weighting: As in :class:`lichen.server.mean.Mean`.
        seed: Of the fresh rows of A.

    Raises:
        LichenError: if the energy is out of range.
    """
    return LowRank(weighting, rule=Redistributed(energy, seed=seed))
