"""FLoRA: stacks the clients' adapters into the frozen layer, and starts a new adapter.

    W0 ← W0 + s Σ p_k B_k A_k = W0 + s [p_1 B_1, p_2 B_2, ...] [A_1; A_2; ...],    A drawn anew,    B = 0

This is the mean model, exactly, whatever the ranks. What it costs is the start: each round's adapter
begins at nothing, and has forgotten its directions. The stack is not sent as it is but cut where it is
rounding noise; where it is larger than the layer, the layer's patch is dense. Memory on the server is the
clients' pairs, and work is in float64: a thin QR of each stack and the SVD of the small core.

References:
    Ziyao Wang, Zheyu Shen, Yexiao He, Guoheng Sun, Hongyi Wang, Lingjuan Lyu and Ang Li. "FLoRA:
    Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations." NeurIPS 2024.
    https://arxiv.org/abs/2409.05976

Legend: m rows of a layer's weight (out), n columns (in), r adapter rank.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import final

from lichen.core.conventions.factor_pairs import factor_names
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.lowrank.adapters import AdapterMeansList, check_scaling, initial_A, patched, rounding_floor
from lichen.server.lowrank.factors import directions, gap_square, halves
from lichen.server.lowrank.lowrank import LowRank
from lichen.server.sums.summed import Weighting

__all__ = ["FLoRA", "Stacked"]


@final
@dataclass(frozen=True, slots=True)
class Stacked:
    """The rule that moves the mean product into the patch and starts the adapter again.

    Args:
        scaling: alpha / r, the factor the model puts on ``B A``.
        seed: Of the new halves A, together with the newest version among the answers.

    Raises:
        LichenError: if the scaling is not a positive number.
    """

    scaling: float
    _: KW_ONLY
    seed: int = 0
    whole = False
    one_version = True

    def __post_init__(self) -> None:
        check_scaling(self.scaling, where="aggregator.flora.scaling")

    def __call__(self, adapters: AdapterMeansList, change: Tree) -> tuple[Shared, dict[str, float]]:
        """``(patches and new halves, metrics)``: ``deviation``, and ``rank``, the directions moved a layer."""
        written: Tree = {}
        patch: Tree = {}
        lost = total_square = 0.0
        ranks: list[int] = []
        for adapter in adapters:
            name = adapter.name
            name_A, name_B = factor_names(name)
            stack = adapter.stack()
            U, sigma, V = directions(stack)
            square = float(sigma.square().sum())
            keep = int((sigma > rounding_floor(adapters.dtype(name)) * math.sqrt(square)).sum())
            if keep:
                left, right = halves(U, sigma, V, keep)
                patch |= patched(name, (left * self.scaling, right), adapters.shared)
            A_rn = initial_A(adapter.A_rn, name, seed=self.seed, version=adapters.version)
            written[name_A] = A_rn - adapter.A_rn
            written[name_B] = -adapter.B_mr
            lost += gap_square(stack, square, (adapter.meanB_mr, adapter.meanA_rn))
            total_square, ranks = total_square + square, [*ranks, keep]
        deviation = math.sqrt(lost / total_square) if total_square else 0.0
        return Shared(written, patch=patch), {"deviation": deviation, "rank": sum(ranks) / max(1, len(ranks))}


def FLoRA(scaling: float, *, weighting: Weighting = "examples", seed: int = 0) -> LowRank:
    """The mean product into each layer's patch, a new A, and B at zero: exact for any ranks.

    The patch and the change belong together: the server optimizer must add the change as it is (SGD at
    rate 1). Metrics: ``deviation``, what averaging A and B would have lost; ``rank``, the mean number of
    directions that went into a layer's patch.

    Args:
        scaling: alpha / r, the factor the model puts on ``B A``.
        weighting: As in :class:`lichen.server.mean.Mean`.
        seed: Of the new halves A.

    Raises:
        LichenError: if the scaling is not a positive number.
    """
    return LowRank(weighting, rule=Stacked(scaling, seed=seed))
