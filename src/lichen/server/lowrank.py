"""Averaging LoRA adapters: as they are (FedIT), or with the part that averaging loses put back (FedEx-LoRA).

The mean of products is not the product of means. With ``p_k`` the clients' shares and bars for means,

    residual = Σ p_k B_k A_k − B̄ Ā = Σ p_k b_k a_k + (Σ p_k b_k) Ā + B̄ (Σ p_k a_k),

where ``b_k = B_k − B̄`` and ``a_k = A_k − Ā``. The right side is what is computed: it has no cancellation,
and stays exact when B̄ and Ā are the means as rounded to the shared dtype. FedIT reports the residual's
size in every round; FedEx-LoRA adds it to the frozen layer's patch, so that nothing is lost. It is kept
as two thin factors, cut where they are rounding noise, while that is smaller than the layer.

Both need single messages. They are sorted by client before use, so bytes do not depend on arrival.
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
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.server.mean import Mean, MeanTotal, Weighting, weigh_C

__all__ = ["FedEx", "FedIT", "LowRankTotal"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    client: int
    version: int
    weight: float
    tensors: Tree


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankTotal:
    """The exact mean so far, and the single clients' adapters.

    Attributes:
        mean: Of all tensors.
        kept: One entry a client, in arrival order.
    """

    mean: MeanTotal
    kept: tuple[_Kept, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class FedIT:
    """The mean of A and of B, and the ``deviation`` this makes.

    ``deviation`` is ``‖Σ p_k B_k A_k − B̄Ā‖ / ‖Σ p_k B_k A_k‖``, Frobenius over all layers together. All
    other tensors are averaged as :class:`Mean` does; the change has Mean's bytes.

    Args:
        weighting: As in :class:`Mean`.
    """

    weighting: Weighting = "examples"
    linear = False
    keeps = True

    def zero(self) -> LowRankTotal:
        """Nothing folded in."""
        return LowRankTotal(mean=Mean(self.weighting).zero())

    def add(self, total: LowRankTotal, message: Message, discount: float = 1.0) -> LowRankTotal:
        """Fold every client of the message in; raises as :meth:`Mean.add`."""
        return _add(self.weighting, total, message, discount)

    def merge(self, a: LowRankTotal, b: LowRankTotal) -> LowRankTotal:
        """Both together; raises as :meth:`Mean.merge`."""
        return _merge(self.weighting, a, b)

    def close(self, total: LowRankTotal, shared: Tree) -> tuple[Tree, dict[str, float]]:
        """``(change, metrics)``; metrics are Mean's and ``deviation``.

        Raises:
            LichenError: if nothing was folded in, a shape is wrong, or a client came twice.
        """
        change, metrics = Mean(self.weighting).close(total.mean, shared)
        lost = kept = 0.0
        for _, residual, ideal in _residuals(total, shared, change):
            lost += float(_core(*residual)[1].square().sum())
            kept += float(_core(*ideal)[1].square().sum())
        return change, {**metrics, "deviation": math.sqrt(lost / kept) if kept else 0.0}


@final
@dataclass(frozen=True, slots=True)
class FedEx:
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

    scaling: float
    _: KW_ONLY
    weighting: Weighting = "examples"
    linear = False
    keeps = True

    def __post_init__(self) -> None:
        if not 0 < self.scaling < math.inf:
            raise LichenError(f"{self.scaling} is no scaling", where="aggregator.fedex.scaling", fix="use alpha / rank")

    def zero(self) -> LowRankTotal:
        """Nothing folded in."""
        return LowRankTotal(mean=Mean(self.weighting).zero())

    def add(self, total: LowRankTotal, message: Message, discount: float = 1.0) -> LowRankTotal:
        """Fold every client of the message in; raises as :meth:`Mean.add`."""
        return _add(self.weighting, total, message, discount)

    def merge(self, a: LowRankTotal, b: LowRankTotal) -> LowRankTotal:
        """Both together; raises as :meth:`Mean.merge`."""
        return _merge(self.weighting, a, b)

    def close(self, total: LowRankTotal, shared: Tree) -> tuple[Tree, dict[str, float]]:
        """``(change, metrics)`` with the patch entries that changed; metrics are Mean's and ``deviation``.

        ``deviation`` is what the residual mended, measured as in :class:`FedIT`.

        Raises:
            LichenError: if nothing was folded in, a shape is wrong, or a client came twice.
        """
        change, metrics = Mean(self.weighting).close(total.mean, shared)
        patch: Tree = {}
        lost = kept = 0.0
        for layer, residual, ideal in _residuals(total, shared, change):
            size_square = float(_core(*ideal)[1].square().sum())
            left, right, square = _thin(residual, math.sqrt(size_square), shared[f"{layer}.lora_A"].dtype)
            lost, kept = lost + square, kept + size_square
            if left.shape[1]:
                patch.update(_patched(layer, left * self.scaling, right, shared))
        return {**change, **patch}, {**metrics, "deviation": math.sqrt(lost / kept) if kept else 0.0}


def _add(weighting: Weighting, total: LowRankTotal, message: Message, discount: float) -> LowRankTotal:
    mean = Mean(weighting).add(total.mean, message, discount)
    weight_C = weigh_C(message, weighting, discount).tolist()
    lora = {name: x.detach().cpu() for name, x in message.tensors.items() if name.endswith((".lora_A", ".lora_B"))}
    new = tuple(
        _Kept(client=client, version=version, weight=weight, tensors={name: x_C[c] for name, x_C in lora.items()})
        for c, (client, version, weight) in enumerate(
            zip(message.client_C.tolist(), message.version_C.tolist(), weight_C, strict=True)
        )
        if weight > 0
    )
    return LowRankTotal(mean=mean, kept=(*total.kept, *new))


def _merge(weighting: Weighting, a: LowRankTotal, b: LowRankTotal) -> LowRankTotal:
    return LowRankTotal(mean=Mean(weighting).merge(a.mean, b.mean), kept=(*a.kept, *b.kept))


Factors = tuple[Tensor, Tensor]
_GRID = 1e-12  # the exact sums are no finer than this, so float64 factors need not be either


def _residuals(total: LowRankTotal, shared: Tree, change: Tree) -> Iterator[tuple[str, Factors, Factors]]:
    """Per layer: its name, the residual's factors, and those of ``Σ p_k B_k A_k``; all float64."""
    kept = sorted(total.kept, key=lambda one: (one.client, one.version))
    for one, other in pairwise(kept):
        if (one.client, one.version) == (other.client, other.version):
            raise LichenError(
                f"client {one.client} answered version {one.version} twice", where="aggregator", fix="count each once"
            )
    weight = sum(one.weight for one in kept)
    for layer in sorted(name.removesuffix(".lora_A") for name in shared if name.endswith(".lora_A")):
        a_name, b_name = f"{layer}.lora_A", f"{layer}.lora_B"
        if b_name not in shared:
            raise LichenError(f"layer {layer!r} has lora_A without lora_B", where="aggregator")
        # The means as the clients will receive them, rounded to the shared dtype.
        meanA, meanB = ((shared[n] + change[n] if n in change else shared[n]).cpu().double() for n in (a_name, b_name))
        left, right, whole_left, whole_right = [], [], [], []
        sumA, sumB = torch.zeros_like(meanA), torch.zeros_like(meanB)
        for one in kept:
            A, B = (
                shared[n].cpu().double() + one.tensors[n].double() if n in one.tensors else shared[n].cpu().double()
                for n in (a_name, b_name)
            )
            share = one.weight / weight
            sumA, sumB = sumA + share * (A - meanA), sumB + share * (B - meanB)
            left.append(share * (B - meanB))
            right.append(A - meanA)
            whole_left.append(share * B)
            whole_right.append(A)
        residual = torch.cat([*left, sumB, meanB], 1), torch.cat([*right, meanA, sumA], 0)
        yield layer, residual, (torch.cat(whole_left, 1), torch.cat(whole_right, 0))


def _core(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``left @ right`` as ``Q core P``, with orthonormal Q (m, ·) and P (·, n): norms are the core's."""
    Q, L = torch.linalg.qr(left)
    P, R = torch.linalg.qr(right.T)
    return Q, L @ R.T, P.T


def _thin(factors: Factors, size: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """The fewest factors that give the product to the rounding of ``dtype``, and its squared norm.

    Args:
        factors: ``(m, R)`` and ``(R, n)``.
        size: Norm of what the product corrects: directions below half its last bit are noise.
        dtype: That the factors will be stored in.
    """
    Q, core, P = _core(*factors)
    U, sigma, V = torch.linalg.svd(core, full_matrices=False)
    keep = sigma > max(torch.finfo(dtype).eps / 2, _GRID) * size
    root = sigma[keep].sqrt()
    return Q @ (U[:, keep] * root), (root[:, None] * V[keep]) @ P, float(sigma.square().sum())


def _patched(layer: str, left: Tensor, right: Tensor, shared: Tree) -> Tree:
    """The layer's whole new patch: the old one and ``left @ right``."""
    like = shared[f"{layer}.lora_A"]
    m, n = left.shape[0], right.shape[1]
    dense = shared.get(f"patch.{layer}.dense")
    if dense is not None:
        return {f"patch.{layer}.dense": (dense.cpu().double() + left @ right).to(like)}
    if f"patch.{layer}.left" in shared:
        left = torch.cat([shared[f"patch.{layer}.left"].cpu().double(), left], 1)
        right = torch.cat([shared[f"patch.{layer}.right"].cpu().double(), right], 0)
    if left.shape[1] * (m + n) >= m * n:
        return {f"patch.{layer}.dense": (left @ right).to(like)}
    return {f"patch.{layer}.left": left.to(like), f"patch.{layer}.right": right.to(like)}
