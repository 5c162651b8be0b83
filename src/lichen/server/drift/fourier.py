"""Random Fourier features: a map φ whose inner products are, in the mean, a Gaussian kernel.

    φ(x) = √(2/D) cos(Ωx/σ + b),   Ω ~ N(0, I),   b ~ U[0, 2π),   E φ(x)ᵀφ(y) = exp(-|x - y|² / 2σ²)

The mean of φ over rows then stands for their whole distribution, as far as the kernel sees it, and two distributions
are compared by D numbers each.

φ is a multiple of ``2^-BITS`` here, and what goes into the cosine is exact: x/σ and Ω are rounded before, so that their
product has the same bits in any order of adding. Rows therefore have the same φ in any company, and sums of it the same
bytes, whoever has which row.

References:
    Ali Rahimi and Benjamin Recht. "Random Features for Large-Scale Kernel Machines." NeurIPS 2007.
    https://papers.nips.cc/paper/2007/hash/013a006f03dbc5392effeb8f18fda755-Abstract.html

Legend: N rows, d numbers of a row, D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator

__all__ = ["BITS", "RandomFourier", "random_fourier"]

BITS = 24
"""Bits after the point of φ: sums of 2^29 rows are exact in float64."""

_FACTOR_BITS = 17
_FARTHEST = 64.0  # bandwidths, of one number of a row; what lies farther is far in any case
_WIDEST = 8192  # 64 · 0.8 · 8192 · 2^34 < 2^53: the products of a row's numbers add exactly


@final
@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RandomFourier:
    """The map φ; :func:`random_fourier` draws one.

    Attributes:
        bandwidth: σ, in the units of the rows.
        omega_dD: Ω, multiples of ``2^-17``.
        shift_D: b.
    """

    bandwidth: float
    omega_dD: Tensor
    shift_D: Tensor

    def units(self, x_Nd: Tensor) -> Tensor:
        """φ of every row in units of ``2^-BITS``, whole numbers as float64 ``(N, D)``.

        Raises:
            LichenError: if a row has another width, or a number of it is not finite.
        """
        x_Nd = x_Nd.detach().cpu().double()
        width, features = self.omega_dD.shape
        if x_Nd.shape[1] != width:
            raise LichenError(
                f"rows have {x_Nd.shape[1]} features, not {width}", where="drift.mmd", fix="give their width"
            )
        if not bool(x_Nd.isfinite().all()):
            raise LichenError("a feature is not finite", where="drift.mmd", fix="check the model and the rows")
        near_Nd = _rounded((x_Nd / self.bandwidth).clamp(-_FARTHEST, _FARTHEST), _FACTOR_BITS)
        z_ND = near_Nd @ self.omega_dD + self.shift_D
        # One row a call: which kernel takes a cosine may hang on its place in a longer tensor.
        cos_ND = torch.stack([row_D.cos() for row_D in z_ND]) if len(z_ND) else z_ND
        units_ND: Tensor = (cos_ND * (math.sqrt(2 / features) * 2.0**BITS)).round()
        return units_ND


def random_fourier(width: int, features: int = 512, *, bandwidth: float, seed: int = 0) -> RandomFourier:
    """A map φ, drawn from a seed.

    Args:
        width: d.
        features: D.
        bandwidth: σ, in the units of the rows.
        seed: Of Ω and b; who compares sums must have the same.

    Raises:
        LichenError: if a number is out of range.
    """
    if not 1 <= width <= _WIDEST or features < 1 or not 0 < bandwidth < math.inf:
        raise LichenError(
            f"{features} features of {width} numbers at bandwidth {bandwidth}",
            where="drift.mmd",
            fix=f"use 1 to {_WIDEST} numbers, 1 feature or more, and a bandwidth above 0",
        )
    g = torch_generator(seed, "random Fourier features", width, features)
    omega_dD = torch.randn(width, features, generator=g, dtype=torch.float64)
    shift_D = torch.rand(features, generator=g, dtype=torch.float64) * (2 * math.pi)
    return RandomFourier(bandwidth=bandwidth, omega_dD=_rounded(omega_dD, _FACTOR_BITS), shift_D=shift_D)


def _rounded(x: Tensor, bits: int) -> Tensor:
    return (x * 2.0**bits).round() * 2.0**-bits
