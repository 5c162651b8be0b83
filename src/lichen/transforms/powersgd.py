"""PowerSGD: low-rank factors in place of matrices.

A change ``M`` (m, n) goes as ``P`` (m, r), orthonormal, and ``Q = Mᵀ P`` (n, r): the other side takes
``P Qᵀ``, the projection of M onto the subspace that the iterations found. Matrices whose factors would be
no smaller than they are, and vectors, are left as they are. The factors are left to the next codec.

References:
    Thijs Vogels, Sai Praneeth Karimireddy and Martin Jaggi. "PowerSGD: Practical Low-Rank Gradient
    Compression for Distributed Optimization." NeurIPS 2019. https://arxiv.org/abs/1905.13727

Legend: C clients, N numbers; of a matrix: m rows, n columns, r the sketch's rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from math import prod
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree
from lichen.transforms.codec import Parts
from lichen.transforms.layout import Layout

__all__ = ["PowerSGD"]


@final
@dataclass(frozen=True, slots=True)
class PowerSGD:
    """Every matrix as two thin ones; ``‖M - P Qᵀ‖ <= ‖M‖``, and 0 where M's rank is at most r.

    Tensors of more than two axes count as matrices of their first axis by all others.

    Args:
        rank: Columns of each factor.
        iterations: Of the subspace; two come close to the best.

    Raises:
        LichenError: if a value is below 1.
    """

    rank: int = 2
    _: KW_ONLY
    iterations: int = 2
    last = False

    def __post_init__(self) -> None:
        if self.rank < 1 or self.iterations < 1:
            raise LichenError(
                f"rank {self.rank} after {self.iterations} iterations is nothing", where="wire", fix="use >= 1"
            )

    def _factors(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """(m, n) of a tensor that is worth factoring."""
        if len(shape) < 2:
            return None
        m, n = shape[0], prod(shape[1:])
        return (m, n) if self.rank * (m + n) < m * n else None

    def parts(self, layout: Layout) -> Parts:
        """Nothing: all is left to the next codec."""
        return {}

    def rest(self, layout: Layout) -> Layout:
        """Factors, and what has none."""
        out: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        for name, shape, dtype in layout.entries:
            thin = self._factors(shape)
            if thin is None:
                out.append((name, shape, dtype))
            else:
                out += [(f"{name}.{x}", (long, self.rank), dtype) for x, long in zip("PQ", thin, strict=True)]
        return Layout(tuple(out))

    def encode(self, x_CN: Tensor, layout: Layout, seeds_C: Sequence[int]) -> tuple[Tree, Tensor]:
        """The factors, client by client, so that a client's bits do not depend on its company."""
        return {}, torch.stack([self._one(x_N, layout, seed) for x_N, seed in zip(x_CN, seeds_C, strict=True)])

    def _one(self, x_N: Tensor, layout: Layout, seed: int) -> Tensor:
        generator, out = torch_generator(seed, "sketch"), []
        for x in layout.by_name(x_N.unsqueeze(0)).values():
            thin = self._factors(tuple(x.shape[1:]))
            if thin is None:
                out.append(x.reshape(-1))
                continue
            size = x.abs().max()
            size = torch.where((size > 0) & size.isfinite(), size, torch.ones_like(size))
            m_mn = x.reshape(thin) / size  # products of its products neither overflow nor vanish
            q_nr = torch.randn(thin[1], self.rank, generator=generator).to(x_N.device)
            for _ in range(self.iterations):
                p_mr, _ = torch.linalg.qr(m_mn @ q_nr)
                q_nr = m_mn.T @ p_mr
            out += [p_mr.reshape(-1), q_nr.reshape(-1) * size]
        return torch.cat(out)

    def decode(self, parts: Tree, rest_CM: Tensor, layout: Layout) -> Tensor:
        """The products."""
        thin = self.rest(layout).by_name(rest_CM)
        rows = []
        for client in range(rest_CM.shape[0]):
            for name, shape, _ in layout.entries:
                if self._factors(shape) is None:
                    rows.append(thin[name][client].reshape(-1))
                else:
                    rows.append((thin[f"{name}.P"][client] @ thin[f"{name}.Q"][client].T).reshape(-1))
        return torch.cat(rows).view(rest_CM.shape[0], layout.size)
