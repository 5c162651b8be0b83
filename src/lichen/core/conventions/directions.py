"""Seeded perturbation directions for zeroth-order methods, equal on every machine.

Zeroth-order methods never store or send a direction z: whoever knows its seed draws it again. That
only works if the bits are the same everywhere, so no float is rounded on the way here. Philox, a
counter-based generator made of integer products, gives 256 bits a counter; a number's bits follow
from its place in the tensor, so z can be drawn in pieces, or one piece alone.

======== ======================================================= ================
kind     integers                                                z, of variance 1
======== ======================================================= ================
signs    −1 or 1, one bit a number                               the integer
bell     a count of 16 bits less 8: −8..8, nearly normal         half the integer
======== ======================================================= ================

References:
    John K. Salmon, Mark A. Moraes, Ron O. Dror and David E. Shaw. "Parallel Random Numbers: As Easy as
    1, 2, 3." SC 2011. https://doi.org/10.1145/2063384.2063405 (Philox)
    James C. Spall. "Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient
    Approximation." IEEE Transactions on Automatic Control 37(3), 1992. https://doi.org/10.1109/9.119632
    (independent signs as the direction)

Legend: P numbers of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.seeds import derive

__all__ = ["PIECE", "UNIT", "Directions", "Kind", "add_direction", "draw_direction", "pieces"]

Kind = Literal["signs", "bell"]

UNIT: Mapping[str, float] = {"signs": 1.0, "bell": 0.5}
"""What one integer step of a kind is worth in z."""

PIECE = 2**16
"""Numbers drawn at a time: they and their floats stay in a core's cache."""

_BITS = {"signs": 1, "bell": 16}
_WORDS = 4  # 64-bit words a counter
_ONES = np.array([bin(i).count("1") for i in range(256)], dtype=np.int8)


@final
class Directions:
    """The direction's integers for one tensor, from its first number on.

    Args:
        seed: The direction's seed.
        name: The tensor's name.
        kind: ``"signs"`` or ``"bell"``.
        start: The number to begin with.

    Raises:
        LichenError: if the kind is unknown.

    >>> Directions(7, "w").take(8).tolist() == draw_direction(7, "w", 0, 8).tolist()
    True
    """

    __slots__ = ("_bits", "_left", "_source")

    def __init__(self, seed: int, name: str, kind: Kind = "signs", *, start: int = 0) -> None:
        if kind not in _BITS:
            raise LichenError(f"unknown noise {kind!r}", where="noise", fix="use signs or bell")
        self._bits = _BITS[kind]
        counter, skip = divmod(start * self._bits, 64 * _WORDS)
        self._source = np.random.Philox(key=derive(seed, "noise", name), counter=counter)
        self._left = np.empty(0, dtype=np.int8)
        if skip:
            self.take(skip // self._bits)

    def take(self, count: int) -> Tensor:
        """The next ``count`` integers, int8 ``(count,)``."""
        need = count - len(self._left)
        if need <= 0:
            ready, self._left = self._left[:count], self._left[count:]
            return torch.from_numpy(ready.copy())
        words = -(-need * self._bits // (64 * _WORDS)) * _WORDS
        # Little-endian on every machine: the bytes' order is part of what must agree.
        raw = self._source.random_raw(words).astype("<u8", copy=False).view(np.uint8)
        if self._bits == 1:
            fresh = np.unpackbits(raw, bitorder="little").view(np.int8)
            np.left_shift(fresh, 1, out=fresh)
            np.subtract(fresh, 1, out=fresh)
        else:
            ones = _ONES[raw]
            fresh = ones[0::2] + ones[1::2] - np.int8(8)
        if len(self._left):
            fresh = np.concatenate([self._left, fresh])
        self._left = fresh[count:].copy()
        return torch.from_numpy(fresh[:count])


def draw_direction(seed: int, name: str, start: int, stop: int, kind: Kind = "signs") -> Tensor:
    """The direction's integers from number ``start`` to ``stop`` of one tensor, int8 ``(stop - start,)``.

    >>> whole = draw_direction(7, "layer.weight", 0, 1000)
    >>> torch.equal(whole[300:700], draw_direction(7, "layer.weight", 300, 700))
    True
    """
    return Directions(seed, name, kind, start=start).take(stop - start)


def pieces(numbers: int, piece: int = PIECE) -> Iterator[slice]:
    """``numbers`` places cut into slices of ``piece``, the last one shorter."""
    return (slice(a, min(a + piece, numbers)) for a in range(0, numbers, piece))


def add_direction(x: Tensor, seed: int, name: str, factor: float, kind: Kind = "signs") -> None:
    """``x += factor * z`` in place and piece by piece, so that z is never held whole.

    Product and sum are rounded one after the other: a fused operation, which some processors have and
    others lack, would give other bits.

    Args:
        x: A contiguous tensor of any float dtype, changed in place.
        seed: The direction's seed.
        name: The tensor's name.
        factor: Of the direction.
        kind: The direction's kind.
    """
    directions, x_N, scale = Directions(seed, name, kind), x.view(-1), factor * UNIT[kind]
    wide = torch.promote_types(x.dtype, torch.float32)
    for part in pieces(x_N.shape[0]):
        step_P = directions.take(part.stop - part.start).to(wide).mul_(scale)
        x_N[part].add_(step_P.to(x.device))
