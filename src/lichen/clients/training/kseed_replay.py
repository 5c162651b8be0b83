"""Rebuilds weights from FedKSeed's seeds and scalars, with the same bits on every machine.

    θ = θ0 − η Σ_s G_s z(s)

Directions z come from seeds and are made of integers; so are the G, in units of ``2^-bits``; so the sum is an
integer below 2^53 at every point, and exact in any order, on any number of threads, from scratch or by what changed
since the last version. Only then is it scaled and rounded, once.

References:
    Zhen Qin, Daoyuan Chen, Bingchen Qian, Bolin Ding, Yaliang Li and Shuiguang Deng. "Federated
    Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18 Kilobytes."
    ICML 2024. https://arxiv.org/abs/2312.06353

Legend: K directions, S of them at a time, P numbers of a piece, N of a tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from lichen.clients.training.mezo import check_rates
from lichen.core import tree as trees
from lichen.core.conventions.directions import UNIT, Directions, Kind, pieces
from lichen.core.errors import LichenError
from lichen.core.seeds import derive
from lichen.core.tree import Tree

__all__ = ["SUMS", "KSeedReplay"]

SUMS = "kseed.sums"
"""``(K,)`` int32 in ``shared``: every direction's summed slope, in units of ``2^-bits``."""
_ABREAST = 16  # directions in one product
_INNER = 2**13  # numbers of each in it: the product's operands stay in a core's cache
_OUTER = 2**16  # numbers drawn of each at a time


@final
class KSeedReplay:
    """What turns seed sums into tensors; one for all works of a node, as it keeps the last version.

    Besides the start it holds 8 bytes a number: the integer sum of the version it was last asked for, so
    that the next costs only the directions which have changed.

    Args:
        start: θ0, the same on every node; not copied.
        lr: η.
        root: The run's seed, from which the directions' are derived.
        count: K.
        bits: Slopes are multiples of ``2^-bits``.
        kind: Directions of ``"signs"`` or ``"bell"``.

    Raises:
        LichenError: if a number is out of range.
    """

    __slots__ = ("_sums_K", "_total", "bits", "count", "kind", "lr", "root", "start")

    def __init__(
        self, start: Tree, *, lr: float, root: int, count: int = 2048, bits: int = 16, kind: Kind = "signs"
    ) -> None:
        if not 1 <= count <= 2**16:
            raise LichenError(f"{count} directions", where="kseed.count", fix="use 1024 to 4096")
        if not 0 <= bits <= 24:
            raise LichenError(f"{bits} is out of range", where="kseed.bits", fix="use 8 to 20")
        check_rates(lr, 1.0, None, "one", kind)
        self.start, self.lr, self.root, self.count, self.bits, self.kind = start, float(lr), root, count, bits, kind
        self._sums_K = torch.zeros(count, dtype=torch.int64)
        self._total: Tree = {}

    @property
    def base(self) -> str:
        """Digest of all that nodes must agree on for their models to be equal (64 hex digits)."""
        settings = f"{self.root}|{self.count}|{self.bits}|{self.kind}|{self.lr.hex()}|{trees.digest(self.start)}"
        return hashlib.sha256(settings.encode()).hexdigest()

    def shared(self) -> Tree:
        """What a run's shared tensors begin as: no step taken along any direction."""
        return {SUMS: torch.zeros(self.count, dtype=torch.int32)}

    def seed(self, direction: int) -> int:
        """The seed of one of the K directions."""
        return derive(self.root, "kseed", direction)

    def slope(self, units: int) -> float:
        """A slope from its units."""
        return units * 2.0**-self.bits

    def tree(self, shared: Tree) -> Tree:
        """θ for these sums: fresh tensors, with the same bits on every machine.

        Args:
            shared: Holds ``kseed.sums``; other names are left aside.

        Raises:
            LichenError: if the sums are missing, or of another number of directions.
        """
        sums = shared.get(SUMS)
        if sums is None or tuple(sums.shape) != (self.count,) or sums.is_floating_point():
            found = "none" if sums is None else f"{tuple(sums.shape)} {sums.dtype}"
            raise LichenError(
                f"expected {SUMS!r} of {self.count} integers, found {found}",
                where="job",
                fix="let clients and server load the same recipe",
            )
        self._go_to(sums.detach().cpu().to(torch.int64))
        scale = self.lr * 2.0**-self.bits * UNIT[self.kind]
        out: Tree = {}
        for name, x in self.start.items():
            new = torch.empty(x.numel(), dtype=x.dtype)
            old_N, total_N = x.detach().reshape(-1), self._total.get(name)
            for part in pieces(x.numel()):
                if total_N is None:
                    new[part] = old_N[part]
                else:
                    # Product, difference and the rounding to the start's dtype are three passes: none is fused.
                    new[part] = old_N[part].cpu().double() - total_N[part] * scale
            out[name] = new.view(x.shape).to(x.device)
        return out

    def _go_to(self, sums_K: Tensor) -> None:
        """Bring the integer sums from the version they stand at to this one, by the cheaper way."""
        change_K = sums_K - self._sums_K
        if int((change_K != 0).sum()) > int((sums_K != 0).sum()):
            self._total, change_K = {}, sums_K
        # A signal between here and the end would leave sums of neither version: begin again from nothing then.
        total, self._total = self._total, {}
        self._sums_K = torch.zeros_like(sums_K)
        at_S = change_K.nonzero().flatten().tolist()
        if at_S and not total:
            total = {name: torch.zeros(x.numel(), dtype=torch.float64) for name, x in self.start.items()}
        for first in range(0, len(at_S), _ABREAST):
            some = at_S[first : first + _ABREAST]
            factor_S = change_K[some].double()
            for name, total_N in total.items():
                self._add(total_N, name, some, factor_S)
        self._total, self._sums_K = total, sums_K

    def _add(self, total_N: Tensor, name: str, directions: Sequence[int], factor_S: Tensor) -> None:
        """``total += Σ_s factor_s z(s)``, exactly: every partial sum is an integer below 2^53."""
        directions_of = [Directions(self.seed(direction), name, self.kind) for direction in directions]
        direction_SP = torch.empty(len(directions_of), _OUTER, dtype=torch.int8)
        wide_SP = torch.empty(len(directions_of), _INNER, dtype=torch.float64)
        for outer in pieces(total_N.shape[0], _OUTER):
            for row_P, direction_of in zip(direction_SP, directions_of, strict=True):
                row_P[: outer.stop - outer.start] = direction_of.take(outer.stop - outer.start)
            for inner in pieces(outer.stop - outer.start, _INNER):
                some_SP = wide_SP[:, : inner.stop - inner.start].copy_(direction_SP[:, inner])
                total_N[outer][inner] += factor_S @ some_SP
