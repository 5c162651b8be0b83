"""Averaging LoRA adapters: as they are (FedIT), or with the part that averaging loses put back (FedEx-LoRA).

The mean of products is not the product of means. With ``p_k`` the clients' shares and bars for means,

    residual = Σ p_k B_k A_k − B̄ Ā = Σ p_k b_k a_k + (Σ p_k b_k) Ā + B̄ (Σ p_k a_k),

where ``b_k = B_k − B̄`` and ``a_k = A_k − Ā``. The right side is what is computed: it has no cancellation,
and stays exact when B̄ and Ā are the means as rounded to the shared dtype. Where a layer's products were
summed whole (:mod:`lichen.server.products`), its first part is ``Σ p_k ΔB_k ΔA_k`` less the means' share.
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
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.server import fixed_point, products
from lichen.server.factors import Product, norm_square, shrink
from lichen.server.fixed_point import WEIGHT_BITS
from lichen.server.mean import Mean, Weighting, weigh_C
from lichen.server.products import LowRankTotal

__all__ = ["FedEx", "FedIT", "LowRank"]

_GRID = 1e-12  # the exact sums are no finer than this, so float64 factors need not be either


@final
@dataclass(frozen=True, slots=True)
class LowRank:
    """The mean of A and of B, the ``deviation`` this makes, and, if asked, its mending; see the two makers below.

    Args:
        weighting: As in :class:`Mean`.
        mend: None, or alpha / r, the factor the model puts on ``B A``: the residual goes to the patch.

    Raises:
        LichenError: if the weighting is unknown, or the factor is not a positive number.
    """

    weighting: Weighting = "examples"
    _: KW_ONLY
    mend: float | None = None
    linear = False
    keeps = True

    def __post_init__(self) -> None:
        Mean(self.weighting)
        if self.mend is not None and not 0 < self.mend < math.inf:
            raise LichenError(f"{self.mend} is no scaling", where="aggregator.fedex.scaling", fix="use alpha / rank")

    def zero(self) -> LowRankTotal:
        """Nothing folded in."""
        return LowRankTotal()

    def add(self, total: LowRankTotal, message: Message, discount: float = 1.0) -> LowRankTotal:
        """Fold every client of the message in; raises as :meth:`Mean.add`."""
        return products.add(total, message, weigh_C(message, self.weighting, discount))

    def merge(self, a: LowRankTotal, b: LowRankTotal) -> LowRankTotal:
        """Both together; raises as :meth:`Mean.merge`."""
        return products.merge(a, b)

    def dump(self, total: LowRankTotal) -> tuple[Tree, dict[str, Any]]:
        """``(tensors, header)`` of a total."""
        return products.dump(total)

    def load(self, tensors: Tree, header: Mapping[str, Any]) -> LowRankTotal:
        """Undo :meth:`dump`; raises as :func:`lichen.server.products.load`."""
        return products.load(tensors, header)

    def close(self, total: LowRankTotal, shared: Tree) -> tuple[Tree, dict[str, float]]:
        """``(change, metrics)``, with the patch entries that changed; metrics are Mean's and ``deviation``.

        ``deviation`` is ``‖residual‖ / ‖Σ p_k B_k A_k‖``, Frobenius over all layers together.

        Raises:
            LichenError: if nothing was folded in, a shape is wrong, or a client came twice.
        """
        change, metrics = Mean(self.weighting).close(total.mean, shared)
        for one, other in pairwise(total.answers):
            if one == other:
                raise LichenError(
                    f"client {one[0]} answered version {one[1]} twice", where="aggregator", fix="count each once"
                )
        patch: Tree = {}
        lost = kept = 0.0
        for layer, residual, ideal in _residuals(total, shared, change):
            size_square = norm_square(ideal)
            if self.mend is None:
                square = norm_square(residual)
            else:
                like = shared[f"{layer}.lora_A"]
                # Directions below half the last bit of what they correct are noise.
                floor = max(torch.finfo(like.dtype).eps / 2, _GRID) * math.sqrt(size_square)
                square, mended = _mended(layer, residual, floor, self.mend, shared)
                patch.update(mended)
            lost, kept = lost + square, kept + size_square
        return {**change, **patch}, {**metrics, "deviation": math.sqrt(lost / kept) if kept else 0.0}


def FedIT(weighting: Weighting = "examples") -> LowRank:
    """The mean of A and of B, and the ``deviation`` this makes.

    All other tensors are averaged as :class:`Mean` does; the change has Mean's bytes.

    Args:
        weighting: As in :class:`Mean`.
    """
    return LowRank(weighting)


def FedEx(scaling: float, *, weighting: Weighting = "examples") -> LowRank:
    """FedIT plus the residual, added to each layer's patch: the mean model, exactly.

    The change may hold, for a layer with a residual, the whole new patch: ``patch.<layer>.left`` (m, R)
    and ``.right`` (R, n), or ``.dense`` (m, n) once ``R (m + n) >= m n``. A layer's ``dense``, where
    present, stands for all of its patch: ``left`` and ``right`` are then no more. The residual belongs
    to the means as sent, so the server optimizer must add the change as it is (SGD at rate 1).

    Args:
        scaling: alpha / r, the factor the model puts on ``B A``.
        weighting: As in :class:`Mean`.

    Raises:
        LichenError: if the scaling is not a positive number.
    """
    return LowRank(weighting, mend=scaling)


def _residuals(total: LowRankTotal, shared: Tree, change: Tree) -> Iterator[tuple[str, Product, Product]]:
    """Per layer: its name, the residual, and ``Σ p_k B_k A_k``; all float64."""
    weight = total.mean.weight / 2**WEIGHT_BITS
    mean = {name: x / weight for name, x in fixed_point.read(total.mean).items()}
    for layer in products.layers(shared):
        names = (f"{layer}.lora_B", f"{layer}.lora_A")
        if names[0] not in shared:
            raise LichenError(f"layer {layer!r} has lora_A without lora_B", where="aggregator")
        B, A = (shared[n].cpu().double() for n in names)
        # The means as the clients will receive them, rounded to the shared dtype, and before rounding.
        roundB, roundA = ((shared[n] + change[n] if n in change else shared[n]).cpu().double() for n in names)
        dB, dA = (mean.get(n, torch.zeros_like(x)) for n, x in zip(names, (B, A), strict=True))
        eB, eA = roundB - B, roundA - A
        whole = products.mean_product(total, layer)
        if whole is not None:
            residual = whole - eB @ eA + (dB - eB) @ A + B @ (dA - eA)
            yield layer, residual, whole + dB @ A + B @ (A + dA)
            continue
        pairs = products.pairs_of(total, layer, (dB, dA))
        left = [share * (b - eB) for share, b, _ in pairs]
        right = [a - eA for *_, a in pairs]
        ideal = torch.cat([share * (B + b) for share, b, _ in pairs], 1), torch.cat([A + a for *_, a in pairs], 0)
        yield layer, (torch.cat([*left, dB - eB, roundB], 1), torch.cat([*right, roundA, dA - eA], 0)), ideal


def _mended(layer: str, residual: Product, floor: float, scaling: float, shared: Tree) -> tuple[float, Tree]:
    """``(norm² of the residual, the layer's whole new patch)``, which is empty where only noise was lost."""
    if isinstance(residual, Tensor):
        square = norm_square(residual)
        return square, _patched(layer, residual * scaling, shared) if square > floor**2 else {}
    (left, right), square = shrink(residual, floor)
    return square, _patched(layer, (left * scaling, right), shared) if left.shape[1] else {}


def _patched(layer: str, new: Product, shared: Tree) -> Tree:
    """The layer's old patch and the new part."""
    like = shared[f"{layer}.lora_A"]
    old: Product | None = shared.get(f"patch.{layer}.dense")
    if old is None and f"patch.{layer}.left" in shared:
        old = shared[f"patch.{layer}.left"].cpu().double(), shared[f"patch.{layer}.right"].cpu().double()
    if isinstance(old, tuple) and isinstance(new, tuple):
        new, old = (torch.cat([old[0], new[0]], 1), torch.cat([old[1], new[1]], 0)), None
    if old is None and isinstance(new, tuple):
        left, right = new
        if left.shape[1] * (left.shape[0] + right.shape[1]) < left.shape[0] * right.shape[1]:
            return {f"patch.{layer}.left": left.to(like), f"patch.{layer}.right": right.to(like)}
    dense = _whole(new) + (0 if old is None else _whole(old))
    return {f"patch.{layer}.dense": dense.to(like)}


def _whole(product: Product) -> Tensor:
    return product.cpu().double() if isinstance(product, Tensor) else product[0] @ product[1]
