"""What an aggregation rule for LoRA reads and writes of a layer when the round closes.

Reading gives the clients' own adapters, each at its own rank, and their shares; a layer that nobody sent
is not read and stays as it is. Writing is a new patch of the frozen layer, or a row of A drawn anew.
All is float64 and thin: no matrix of a layer's full size is made, unless it takes less memory than the
factors that stand for it.

Legend: m rows of a layer's weight (out), n columns (in), r shared rank, R rank of factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from lichen.core.conventions.factor_pairs import factor_names, layers_with_factors
from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.lowrank import products
from lichen.server.lowrank.factors import Factors, Product
from lichen.server.lowrank.groups import MeanChange
from lichen.server.lowrank.products import Key, LowRankTotal

__all__ = [
    "AdapterMeans",
    "AdapterMeansList",
    "Rule",
    "check_scaling",
    "initial_A",
    "padded",
    "patched",
    "rounding_floor",
]

_GRID = 1e-12  # the exact sums are no finer than this, so float64 factors need not be either


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterMeans:
    """One layer that clients sent, float64 on the CPU.

    Attributes:
        name: The layer's.
        B_mr: Shared.
        A_rn: Shared.
        meanB_mr: Mean of the zero-padded halves of the clients; ``B_mr`` where none was sent.
        meanA_rn: The same.
        pairs: ``(answer, p_k, B_k, A_k)``: each client's own adapter at its own rank, in order of the
            answers. Where one half was not sent, one pair stands for all. Empty where ``ideal_mn`` is given.
        ideal_mn: ``Σ p_k B_k A_k``, where a layer was summed whole.
        both: Both halves were sent.
    """

    name: str
    B_mr: Tensor
    A_rn: Tensor
    meanB_mr: Tensor
    meanA_rn: Tensor
    pairs: tuple[tuple[Key, float, Tensor, Tensor], ...]
    ideal_mn: Tensor | None
    both: bool

    def ideal(self) -> Product:
        """``Σ p_k B_k A_k``, what the mean model holds: ``[p_1 B_1, p_2 B_2, ...] [A_1; A_2; ...]``, or whole."""
        if self.ideal_mn is not None:
            return self.ideal_mn
        return self.stack()

    def stack(self) -> Factors:
        """:meth:`ideal` of a layer whose pairs are kept."""
        return torch.cat([p * B for _, p, B, _ in self.pairs], 1), torch.cat([A for *_, A in self.pairs], 0)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterMeansList:
    """The layers that clients sent, in name order; read one at a time, as often as wished.

    Attributes:
        total: What was folded in.
        shared: The shared tensors.
        means: Of every tensor that was sent.
    """

    total: LowRankTotal
    shared: Shared
    means: Mapping[str, MeanChange]

    def dtype(self, layer: str) -> torch.dtype:
        """Of a layer's shared factors."""
        return self.shared.trainable[factor_names(layer)[0]].dtype

    @property
    def version(self) -> int:
        """The newest version among the answers."""
        return max(version for _, version in self.total.answers)

    def __iter__(self) -> Iterator[AdapterMeans]:
        for name in layers_with_factors(self.shared.trainable):
            half_A, half_B = factor_names(name)
            halves = (half_B, half_A)
            if halves[0] not in self.shared.trainable:
                raise LichenError(f"layer {name!r} has lora_A without lora_B", where="aggregator")
            sent = [half for half in halves if half in self.means]
            if sent:
                yield self._read(name, halves, sent)

    def _read(self, name: str, halves: tuple[str, str], sent: list[str]) -> AdapterMeans:
        B, A = (self.shared.trainable[half].cpu().double() for half in halves)
        meanB, meanA = (
            x + self.means[half].over(x) if half in self.means else x for half, x in zip(halves, (B, A), strict=True)
        )
        both = len(sent) == 2
        ideal = products.mean_product(self.total, name)
        if ideal is not None:
            dB, dA = (self.means[half].padded for half in halves)
            share_r = self.means[halves[0]].share_r
            reached = A if share_r is None else share_r.unsqueeze(1) * A
            ideal = ideal + dB @ A + B @ (reached + dA)
        # Where the other half is everybody's, the mean of the products is the product with the mean.
        pairs: tuple[tuple[Key, float, Tensor, Tensor], ...] = (((-1, -1), 1.0, meanB, meanA),)
        if both:
            pairs = tuple(
                (answer, p, B[:, : b.shape[1]] + b, A[: a.shape[0]] + a)
                for answer, p, b, a in products.pairs_of(self.total, name)
            )
        return AdapterMeans(
            name=name, B_mr=B, A_rn=A, meanB_mr=meanB, meanA_rn=meanA, pairs=pairs, ideal_mn=ideal, both=both
        )


class Rule(Protocol):
    """What becomes of the adapters when a round closes."""

    @property
    def whole(self) -> bool:
        """Layers may be summed whole; else the rule needs the pairs."""
        ...

    @property
    def one_version(self) -> bool:
        """All clients must have begun with the same adapters."""
        ...

    def __call__(self, adapters: AdapterMeansList, change: Tree) -> tuple[Shared, dict[str, float]]:
        """``(entries, metrics)``: what is written over the padded means ``change``, and what is told."""
        ...


def padded(x: Tensor, like: Tensor) -> Tensor:
    """``x`` filled up with zeros at its ends to the shape of ``like``.

    >>> padded(torch.ones(1, 2), torch.zeros(2, 2))
    tensor([[1., 1.],
            [0., 0.]])
    """
    if x.shape == like.shape:
        return x
    out = x.new_zeros(like.shape)
    out[tuple(slice(0, size) for size in x.shape)] = x
    return out


def check_scaling(scaling: float, *, where: str) -> None:
    """Refuse a factor that is not a positive number.

    Raises:
        LichenError: naming ``where``.
    """
    if not 0 < scaling < math.inf:
        raise LichenError(f"{scaling} is no scaling", where=where, fix="use alpha / rank")


def rounding_floor(dtype: torch.dtype) -> float:
    """Below this share of a matrix's norm a direction is rounding: half the last bit of what it corrects."""
    return max(torch.finfo(dtype).eps / 2, _GRID)


def initial_A(like_rn: Tensor, layer: str, *, seed: int, version: int) -> Tensor:
    """A new half A, uniform in ±1/sqrt(n) as adapters start, float64."""
    g = torch_generator(seed, "lora_A", layer, version)
    r, n = like_rn.shape
    A_rn: Tensor = (2 * torch.rand(r, n, generator=g, dtype=torch.float64) - 1) / n**0.5
    return A_rn


def patched(layer: str, new: Product, shared: Shared) -> Tree:
    """A layer's whole new patch, the old one and the new part: ``left`` and ``right``, or ``dense`` if smaller."""
    like, patch = shared.trainable[factor_names(layer)[0]], shared.patch
    dense, left, right = (f"{layer}.{kind}" for kind in ("dense", "left", "right"))
    old: Product | None = patch.get(dense)
    if old is None and left in patch:
        old = patch[left].cpu().double(), patch[right].cpu().double()
    if isinstance(old, tuple) and isinstance(new, tuple):
        new, old = (torch.cat([old[0], new[0]], 1), torch.cat([old[1], new[1]], 0)), None
    if old is None and isinstance(new, tuple):
        left_mR, right_Rn = new
        if left_mR.shape[1] * (left_mR.shape[0] + right_Rn.shape[1]) < left_mR.shape[0] * right_Rn.shape[1]:
            return {left: left_mR.to(like), right: right_Rn.to(like)}
    whole_mn = _whole(new) + (0 if old is None else _whole(old))
    return {dense: whole_mn.to(like)}


def _whole(product: Product) -> Tensor:
    return product.cpu().double() if isinstance(product, Tensor) else product[0] @ product[1]
