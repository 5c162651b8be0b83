"""Codecs that compress a change, and chains of them.

A codec turns a vector into *parts*, which are sent as they are, and a *rest*, a shorter vector that the
next codec of the chain turns into parts of its own: top-k writes where the largest numbers were and leaves
those numbers, which four bits each then stand for. What remains after the last codec goes as float32. All
parts of one client lie in one row of bytes whose length follows from the layout alone, so that every
client of one layout sends equally many, and no part needs a header.

What a codec loses is the caller's to remember (:mod:`lichen.transforms.uplink`, error feedback). Decoding is
deterministic: the same bytes give the same bits wherever they are read.

Legend: C clients, N numbers that come, M numbers that are left to the next codec, B bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.transforms.layout import Layout

__all__ = ["Chain", "Codec", "Parts"]

Parts = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtypes and shapes without client axis, in the order they are written."""


class Codec(Protocol):
    """A frozen value; client c's parts depend on row c and its seed alone, whoever stands beside it."""

    @property
    def last(self) -> bool:
        """Nothing is left to a codec after it."""
        ...

    def parts(self, layout: Layout) -> Parts:
        """What is written for one client of this layout."""
        ...

    def rest(self, layout: Layout) -> Layout:
        """What is left to the next codec."""
        ...

    def encode(self, x_CN: Tensor, layout: Layout, seeds_C: Sequence[int]) -> tuple[Tree, Tensor]:
        """``(parts, rest_CM)`` of float32 numbers; parts are ``(C, ...)``."""
        ...

    def decode(self, parts: Tree, rest_CM: Tensor, layout: Layout) -> Tensor:
        """``(C, N)`` float32: what the other side takes for the numbers."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Chain:
    """Codecs one after another; without any, the numbers go as float32.

    Args:
        codecs: In the order in which they encode.

    Raises:
        LichenError: if a codec stands after one that leaves nothing.

    >>> Chain().nbytes(Layout.vector(10))
    40
    """

    codecs: tuple[Codec, ...] = ()

    def __post_init__(self) -> None:
        for codec in self.codecs[:-1]:
            if codec.last:
                raise LichenError(
                    f"{type(codec).__name__} leaves nothing for {type(self.codecs[-1]).__name__}",
                    where="wire",
                    fix="put the codec that writes numbers last, for example: topk, int4",
                )

    def nbytes(self, layout: Layout) -> int:
        """B: bytes of one client."""
        parts, rest = self._written(layout)
        return sum(_nbytes(dtype, shape) for dtype, shape in parts.values()) + 4 * rest.size

    def encode(self, x_CN: Tensor, layout: Layout, seeds_C: Sequence[int]) -> Tensor:
        """Each client's numbers as a row of bytes.

        Args:
            x_CN: Float32.
            layout: What lies where.
            seeds_C: One for each client; all that is random follows from it.

        Returns:
            uint8 ``(C, B)``.
        """
        rows = []
        for codec, inner in self._steps(layout):
            parts, x_CN = codec.encode(x_CN, inner, seeds_C)
            rows += [_bytes(parts[name]) for name in codec.parts(inner)]
        rows.append(_bytes(x_CN.float()))
        return torch.cat(rows, 1)

    def decode(self, bytes_CB: Tensor, layout: Layout) -> Tensor:
        """Undo :meth:`encode` as far as that is possible: float32 ``(C, N)``.

        Raises:
            LichenError: if the rows do not have this layout's length.
        """
        if bytes_CB.dtype != torch.uint8 or bytes_CB.dim() != 2 or bytes_CB.shape[1] != self.nbytes(layout):
            raise LichenError(
                f"{tuple(bytes_CB.shape)} {bytes_CB.dtype} are not {self.nbytes(layout)} bytes a client",
                where="wire",
                fix="let clients and server run the same recipe",
            )
        at, written = 0, []
        for codec, inner in self._steps(layout):
            parts: Tree = {}
            for name, (dtype, shape) in codec.parts(inner).items():
                end = at + _nbytes(dtype, shape)
                parts[name], at = _numbers(bytes_CB[:, at:end], dtype, shape), end
            written.append((codec, inner, parts))
        x_CN = _numbers(bytes_CB[:, at:], torch.float32, (self._written(layout)[1].size,))
        for codec, inner, parts in reversed(written):
            x_CN = codec.decode(parts, x_CN, inner)
        return x_CN

    def _steps(self, layout: Layout) -> Iterator[tuple[Codec, Layout]]:
        """Each codec with the layout of what comes to it."""
        for codec in self.codecs:
            yield codec, layout
            layout = codec.rest(layout)

    def _written(self, layout: Layout) -> tuple[Parts, Layout]:
        parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for place, (codec, inner) in enumerate(self._steps(layout)):
            parts |= {f"{place}.{name}": about for name, about in codec.parts(inner).items()}
            layout = codec.rest(inner)
        return parts, layout


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return prod(shape) * dtype.itemsize


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().reshape(x.shape[0], -1).view(torch.uint8)


def _numbers(bytes_CB: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not prod(shape):
        return torch.empty(bytes_CB.shape[0], *shape, dtype=dtype, device=bytes_CB.device)
    # Copied, so that numbers begin where their dtype may begin.
    return bytes_CB.clone(memory_format=torch.contiguous_format).view(dtype).reshape(bytes_CB.shape[0], *shape)
