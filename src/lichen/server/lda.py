"""Linear discriminant analysis of all clients' rows, from one message each (FedCGS).

Frozen features of a class are taken for normal around the class's mean, with one covariance for all:

    μ_k = Σ x / n_k      Σ = (Σ x xᵀ - Σ_k n_k μ_k μ_kᵀ) / n      w_k = Σ⁻¹ μ_k      b_k = log(n_k / n) - μ_kᵀ w_k / 2

All of it follows from the sums of the ridge classifier (:mod:`lichen.clients.statistics.sufficient`): the class sums
are H's columns, the second moments are G. The sums are exact, so how rows are split over clients does not
change one byte of the head. Unlike ridge, a rare class is not drowned by a common one, and the softmax of
the scores is the model's own posterior.

``shrinkage`` mixes the covariance with the multiple of the identity that has its trace; it is needed where
there are fewer rows than features.

References:
    Zenghao Guan, Yucan Zhou and Xiaoyan Gu. "Capture Global Feature Statistics for One-Shot Federated
    Learning." AAAI 2025. https://arxiv.org/abs/2503.06962 (FedCGS)
    Ronald A. Fisher. "The use of multiple measurements in taxonomic problems." Annals of Eugenics 7(2), 1936.
    Olivier Ledoit and Michael Wolf. "A well-conditioned estimator for large-dimensional covariance
    matrices." Journal of Multivariate Analysis 88(2), 2004 (the target of the shrinkage).

Legend: C clients, d features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.wire.shared import Shared
from lichen.server.ridge import change_to, statistics_terms
from lichen.server.sums import fixed_point
from lichen.server.sums.fixed_point import FixedSum
from lichen.server.sums.lifted import Terms
from lichen.server.sums.summed import Summed

__all__ = ["Lda", "discriminant"]

NEVER = -1e30
"""Bias of a class without a row, whose prior is zero."""


@final
@dataclass(frozen=True, slots=True)
class Lda(Summed):
    """Closed-form head from the statistics of :class:`lichen.clients.statistics.sufficient.Statistics`.

    Args:
        shrinkage: In [0, 1].
        bits: Those of the statistics; their sums are then exact.
        bias: The statistics' last feature is the constant 1; it is left out, for the discriminant has
            its own bias.
        head: Name of the layer.

    Raises:
        LichenError: if the shrinkage is out of range.
    """

    shrinkage: float = 0.1
    _: KW_ONLY
    bits: int = 18
    bias: bool = True
    head: str = "head"

    def __post_init__(self) -> None:
        if not 0 <= self.shrinkage <= 1:
            raise LichenError(
                f"{self.shrinkage} is out of range", where="aggregator.lda.shrinkage", fix="use a number from 0 to 1"
            )

    def zero(self) -> FixedSum:
        """Nothing folded in."""
        return FixedSum(scale=2 * self.bits)

    def terms(self, message: Message, discount_C: Tensor | None) -> Iterator[Terms]:
        """The statistics of every client with rows; raises as :func:`lichen.server.ridge.statistics_terms`."""
        yield statistics_terms(message, discount_C, where="aggregator.lda")

    def close(self, total: FixedSum, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)``: what turns ``shared``'s head into the discriminant, as ``Ridge`` gives it.

        The head itself, float64, where ``shared`` has none. Metrics are ``clients`` and ``examples``.

        Raises:
            LichenError: if nothing was folded in, or the head in ``shared`` has another shape.
        """
        if not total.count:
            raise LichenError(
                "no client contributed", where="aggregator.lda", fix="invite clients that have labelled rows"
            )
        sums = fixed_point.read_sums(total)
        wide = sums["G"].shape[0] - self.bias
        weight_Kd, bias_K = discriminant(sums["G"][:wide, :wide], sums["H"][:wide], sums["n"], shrinkage=self.shrinkage)
        solution = {f"{self.head}.weight": weight_Kd, f"{self.head}.bias": bias_K}
        change = change_to(solution, shared.trainable, where="aggregator.lda")
        return Shared(change), {"clients": float(total.count), "examples": float(sums["n"].sum())}


def discriminant(G_dd: Tensor, H_dK: Tensor, n_K: Tensor, *, shrinkage: float) -> tuple[Tensor, Tensor]:
    """``(weight_Kd, bias_K)`` from the sums of ``x xᵀ``, of ``x`` by class, and the counts; float64.

    A class without rows has weight zero and a bias below any other's.

    >>> one = torch.eye(1, dtype=torch.float64)
    >>> w, b = discriminant(12 * one, torch.tensor([[-3.0, 3.0]]).double(), torch.tensor([3.0, 3.0]), shrinkage=0.0)
    >>> w.flatten().tolist(), [round(x, 3) for x in b.tolist()]
    ([-1.0, 1.0], [-1.193, -1.193])
    """
    n = n_K.sum()
    mean_Kd = H_dK.T / n_K.clamp(min=1)[:, None]
    within_dd = (G_dd - torch.einsum("k,ki,kj->ij", n_K.to(G_dd), mean_Kd, mean_Kd)) / n
    wide = within_dd.shape[0]
    target_dd = within_dd.trace() / wide * torch.eye(wide, dtype=G_dd.dtype)
    weight_Kd = _solve((1 - shrinkage) * within_dd + shrinkage * target_dd, mean_Kd.T).T
    bias_K = torch.special.xlogy(torch.ones_like(n_K), n_K / n) - (mean_Kd * weight_Kd).sum(1) / 2
    return weight_Kd.contiguous(), torch.where(n_K > 0, bias_K, torch.full_like(bias_K, NEVER))


def _solve(cov_dd: Tensor, mean_dK: Tensor) -> Tensor:
    values_d, V_dd = torch.linalg.eigh(cov_dd)
    # Directions that only rounding has filled carry no difference between classes worth its noise.
    floor = cov_dd.shape[0] * torch.finfo(cov_dd.dtype).eps * float(values_d[-1].clamp(min=0))
    inverse_d = torch.where(values_d > floor, 1 / values_d.clamp(min=floor or 1.0), torch.zeros_like(values_d))
    weight_dK: Tensor = V_dd @ ((V_dd.T @ mean_dK) * inverse_d[:, None])
    return weight_dK
