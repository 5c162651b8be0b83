"""Averages LoRA adapters: FedIT, or FedEx-LoRA with the residual added to the base.

The mean of products is not the product of means. With ``p_k`` the clients' shares and bars for means,

    residual = Σ p_k B_k A_k − B̄ Ā = Σ p_k b_k a_k + (Σ p_k b_k) Ā + B̄ (Σ p_k a_k),

where ``b_k = B_k − B̄`` and ``a_k = A_k − Ā``. The right side is what is computed: it has no cancellation,
and stays exact when B̄ and Ā are the means as rounded to the shared dtype. A client of a lower rank counts
with zeros for the directions it lacks. Where a layer's products were summed whole
(:mod:`lichen.server.lowrank.products`), the residual is the left side.
FedIT reports the residual's size in every round; FedEx-LoRA adds it to the frozen layer's patch, so that
nothing is lost. It is kept as two thin factors, cut where they are rounding noise, while that is smaller
than the layer.

Where only sums may be seen, :class:`lichen.server.mean.Mean` gives FedIT's change without its report.

References:
    Jianyi Zhang, Saeed Vahidian, Martin Kuo, Chunyuan Li, Ruiyi Zhang, Tong Yu, Guoyin Wang and Yiran
    Chen. "Towards Building the FederatedGPT: Federated Instruction Tuning." ICASSP 2024.
    https://arxiv.org/abs/2305.05644 (FedIT)
    Raghav Singhal, Kaustubh Ponkshe and Praneeth Vepakomma. "FedEx-LoRA: Exact Aggregation for Federated
    and Efficient Fine-Tuning of Large Language Models." ACL 2025. https://arxiv.org/abs/2410.09432

Legend: m rows of a layer's weight (out), n columns (in), r adapter rank, R rank of factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.conventions.factor_pairs import factor_names
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.lowrank import groups, products
from lichen.server.lowrank.adapters import (
    AdapterMeans,
    AdapterMeansList,
    Rule,
    check_scaling,
    padded,
    patched,
    rounding_floor,
)
from lichen.server.lowrank.factors import Product, norm_square, shrink
from lichen.server.lowrank.products import LowRankTotal
from lichen.server.mean import Mean
from lichen.server.single import SingleMessages
from lichen.server.sums.fixed_point import WEIGHT_BITS
from lichen.server.sums.summed import Weighting, weigh_C

__all__ = ["FedEx", "FedIT", "LowRank"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Averaged:
    """The rule that leaves the means as they are, tells the ``deviation`` this makes, and, if asked, mends it.

    Args:
        mend: None, or alpha / r, the factor the model puts on ``B A``: the residual goes to the patch.

    Raises:
        LichenError: if the factor is not a positive number.
    """

    mend: float | None = None
    whole = True

    @property
    def one_version(self) -> bool:
        """What averaging loses of old factors would be mended at the wrong place."""
        return self.mend is not None

    def __post_init__(self) -> None:
        if self.mend is not None:
            check_scaling(self.mend, where="aggregator.fedex.scaling")

    def __call__(self, adapters: AdapterMeansList, change: Tree) -> tuple[Shared, dict[str, float]]:
        """``(patch, metrics)``: ``deviation`` is ``‖residual‖ / ‖Σ p_k B_k A_k‖`` over all layers together."""
        patch: Tree = {}
        lost = total_square = 0.0
        for adapter in adapters:
            residual, ideal = _residual(adapter, adapters.shared.trainable, change), adapter.ideal()
            size_square = norm_square(ideal)
            if self.mend is None:
                square = norm_square(residual)
            else:
                floor = rounding_floor(adapters.dtype(adapter.name)) * math.sqrt(size_square)
                square, mended = _mended(adapter.name, residual, floor, self.mend, adapters.shared)
                patch.update(mended)
            lost, total_square = lost + square, total_square + size_square
        return Shared(patch=patch), {"deviation": math.sqrt(lost / total_square) if total_square else 0.0}


@final
@dataclass(frozen=True, slots=True)
class LowRank(SingleMessages):
    """Exact means of all tensors, and a rule for the adapters; made by the names of the methods.

    Args:
        weighting: As in :class:`Mean`.
        rule: What becomes of the adapters when the round closes.

    Raises:
        LichenError: if the weighting is unknown.
    """

    weighting: Weighting = "examples"
    _: KW_ONLY
    rule: Rule = Averaged()

    def __post_init__(self) -> None:
        Mean(self.weighting)

    @property
    def one_version(self) -> bool:
        """As the rule says: products are of the adapters that clients began with."""
        return self.rule.one_version

    def zero(self) -> LowRankTotal:
        """Nothing folded in."""
        return LowRankTotal(whole=self.rule.whole)

    def add(self, total: LowRankTotal, message: Message, discount_C: Tensor | None = None) -> LowRankTotal:
        """Fold every client of the message in; ranks and layers may differ from those before.

        Raises:
            LichenError: if a number is not finite, or a sum leaves its range.
        """
        return products.add(total, message, weigh_C(message, self.weighting, discount_C))

    def clients(self, total: LowRankTotal) -> int:
        """Clients folded in."""
        return total.sums.count

    def merge(self, a: LowRankTotal, b: LowRankTotal) -> LowRankTotal:
        """Both together; raises as :meth:`add`."""
        return products.merge(a, b)

    def dump(self, total: LowRankTotal) -> tuple[Tree, dict[str, Any]]:
        """``(tensors, header)`` of a total."""
        return products.dump(total)

    def load(self, tensors: Tree, header: Mapping[str, Any]) -> LowRankTotal:
        """Undo :meth:`dump`; raises as :func:`lichen.server.lowrank.products.load`."""
        return products.load(tensors, header)

    def close(self, total: LowRankTotal, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)``: the means of what was sent, and what the rule writes over them.

        Means are in the dtype of ``shared``. What a rule makes anew is in float64, so that the server's
        step lands on it to the last bit. Metrics are Mean's, ``deviation``, and the rule's own.

        Raises:
            LichenError: if nothing was folded in, a shape is wrong, a client came twice, or clients
                sent different halves of a layer.
        """
        products.check(total)
        means = groups.means(total.sums, shared.trainable)
        before = shared.trainable
        change = {
            name: mean.over(before[name]).to(before[name]) if name in before else mean.padded
            for name, mean in means.items()
        }
        written, rule_metrics = self.rule(AdapterMeansList(total=total, shared=shared, means=means), change)
        seen = {"clients": float(total.sums.count), "weight": total.sums.weight / 2**WEIGHT_BITS}
        return Shared(change) | written, {**seen, **rule_metrics}


def FedIT(weighting: Weighting = "examples") -> LowRank:
    """The mean of A and of B, zero-padded where ranks differ, and the ``deviation`` this makes.

    All other tensors are averaged as :class:`Mean` does; where all clients send the same, the change
    has Mean's bytes.

    Args:
        weighting: As in :class:`Mean`.
    """
    return LowRank(weighting, rule=Averaged())


def FedEx(scaling: float, *, weighting: Weighting = "examples") -> LowRank:
    """FedIT plus the residual, added to each layer's patch: the mean model, exactly, for any ranks.

    The change may hold, for a layer with a residual, the whole new patch: ``<layer>.left`` (m, R)
    and ``.right`` (R, n), or ``.dense`` (m, n) once ``R (m + n) >= m n``. A layer's ``dense``, where
    present, stands for all of its patch: ``left`` and ``right`` are then no more. The residual belongs
    to the means as sent, so the server optimizer must add the change as it is (SGD at rate 1).

    Args:
        scaling: alpha / r, the factor the model puts on ``B A``.
        weighting: As in :class:`Mean`.

    Raises:
        LichenError: if the scaling is not a positive number.
    """
    return LowRank(weighting, rule=Averaged(mend=scaling))


def _residual(adapter: AdapterMeans, shared: Tree, change: Tree) -> Product:
    """What the means, as the clients will receive them, lack of the ideal; float64."""
    names = factor_names(adapter.name)[::-1]
    roundB, roundA = ((shared[n] + change[n] if n in change else shared[n]).cpu().double() for n in names)
    if adapter.ideal_mn is not None:
        return adapter.ideal_mn - roundB @ roundA
    left = [p * (padded(B, roundB) - roundB) for _, p, B, _ in adapter.pairs]
    right = [padded(A, roundA) - roundA for *_, A in adapter.pairs]
    left += [adapter.meanB_mr - roundB, roundB]
    right += [roundA, adapter.meanA_rn - roundA]
    return torch.cat(left, 1), torch.cat(right, 0)


def _mended(layer: str, residual: Product, floor: float, scaling: float, shared: Shared) -> tuple[float, Tree]:
    """``(norm² of the residual, the layer's whole new patch)``, which is empty where only noise was lost."""
    if isinstance(residual, Tensor):
        square = norm_square(residual)
        return square, patched(layer, residual * scaling, shared) if square > floor**2 else {}
    (left, right), square = shrink(residual, floor)
    return square, patched(layer, (left * scaling, right), shared) if left.shape[1] else {}
