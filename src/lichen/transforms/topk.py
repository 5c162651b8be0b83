"""Top-k sparsification in chunks.

In each chunk of ``chunk`` numbers the ``keep`` largest magnitudes stay; the rest are zero to the other side.
A fixed number in each chunk makes every message equally long. Which ones stayed is one of ``binomial(chunk,
keep)`` choices, and its number in the combinatorial number system is written with as few bits as such a
number needs (enumerative coding): 6.1 bits for each of 8 in 256, where an index alone takes 8. Where that
number would not fit into 63 bits, the indices are written.

What is left out must be remembered and sent later (error feedback), else it is lost for good.

References:
    Frank Seide, Hao Fu, Jasha Droppo, Gang Li and Dong Yu. "1-Bit Stochastic Gradient Descent and its
    Application to Data-Parallel Distributed Training of Speech DNNs." Interspeech 2014 (error feedback).
    Alham Fikri Aji and Kenneth Heafield. "Sparse Communication for Distributed Gradient Descent." EMNLP
    2017. https://arxiv.org/abs/1704.05021
    Thomas M. Cover. "Enumerative Source Encoding." IEEE Transactions on Information Theory 19(1), 1973.

Legend: C clients, N numbers, R chunks (rows), n numbers of a chunk, k of them kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import comb
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.transforms.bits import bytes_for, pack_bits, unpack_bits
from lichen.transforms.codec import Parts
from lichen.transforms.layout import Layout

__all__ = ["TopK"]

MOST_BITS = 62
"""Of a choice's number, so that sums of binomials stay inside int64."""


@cache
def _binomials(chunk: int, keep: int) -> Tensor:
    """``binomial(i, j + 1)`` for j < keep and i < chunk, cut at int64's end; int64 ``(keep, chunk)``."""
    most = 2**63 - 1
    return torch.tensor([[min(comb(i, j + 1), most) for i in range(chunk)] for j in range(keep)])


@final
@dataclass(frozen=True, slots=True)
class TopK:
    """The ``keep`` largest of every ``chunk`` numbers; ``‖x - x̂‖² <= (1 - keep / chunk) ‖x‖²``.

    The kept numbers, in the order of their places, are left to the next codec.

    Args:
        keep: How many stay in each chunk.
        chunk: Of how many.

    Raises:
        LichenError: if a value is out of range.
    """

    keep: int = 8
    chunk: int = 256
    last = False

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.chunk:
            raise LichenError(
                f"cannot keep {self.keep} of {self.chunk} numbers", where="wire", fix="use for example 8 of 256"
            )

    @property
    def _choice_bits(self) -> int:
        """Bits of one chunk's choice; 0 where it is too large to be one number."""
        bits = (comb(self.chunk, self.keep) - 1).bit_length()
        return bits if bits <= MOST_BITS else 0

    @property
    def _index_bits(self) -> int:
        return max(1, (self.chunk - 1).bit_length())

    def _chunks(self, layout: Layout) -> int:
        return -(-layout.size // self.chunk)

    def parts(self, layout: Layout) -> Parts:
        """The places."""
        rows = self._chunks(layout)
        if self.chunk == self.keep:
            return {}
        if self._choice_bits:
            return {"place": (torch.uint8, (bytes_for(rows, self._choice_bits),))}
        return {"place": (torch.uint8, (bytes_for(rows * self.keep, self._index_bits),))}

    def rest(self, layout: Layout) -> Layout:
        """The kept numbers."""
        return Layout.vector(self._chunks(layout) * self.keep)

    def encode(self, x_CN: Tensor, layout: Layout, seeds_C: Sequence[int]) -> tuple[Tree, Tensor]:
        """Places and kept numbers."""
        clients, count = x_CN.shape
        short = -count % self.chunk
        x_CRn = torch.nn.functional.pad(x_CN, (0, short)).view(clients, -1, self.chunk)
        # What only fills up the last chunk is never preferred to a number.
        size_CRn = torch.nn.functional.pad(x_CN.abs(), (0, short), value=-1.0).view(clients, -1, self.chunk)
        place_CRk = size_CRn.topk(self.keep, -1, sorted=False).indices.sort(-1).values
        rest_CM = x_CRn.gather(-1, place_CRk).reshape(clients, -1)
        if self.chunk == self.keep:
            return {}, rest_CM
        if not self._choice_bits:
            return {"place": pack_bits(place_CRk.reshape(clients, -1), self._index_bits)}, rest_CM
        table = _binomials(self.chunk, self.keep).to(x_CN.device)
        choice_CR = torch.zeros(place_CRk.shape[:-1], dtype=torch.int64, device=x_CN.device)
        for j in range(self.keep):
            choice_CR += table[j][place_CRk[..., j]]
        return {"place": pack_bits(choice_CR, self._choice_bits)}, rest_CM

    def decode(self, parts: Tree, rest_CM: Tensor, layout: Layout) -> Tensor:
        """Kept numbers at their places, zeros elsewhere."""
        clients, rows = rest_CM.shape[0], self._chunks(layout)
        value_CRk = rest_CM.view(clients, rows, self.keep)
        if self.chunk == self.keep:
            return rest_CM[:, : layout.size]
        if self._choice_bits:
            place_CRk = self._positions(unpack_bits(parts["place"], rows, self._choice_bits).long())
        else:
            place_CRk = unpack_bits(parts["place"], rows * self.keep, self._index_bits).long()
            place_CRk = place_CRk.view(clients, rows, self.keep).clamp(max=self.chunk - 1)
        x_CRn = torch.zeros(clients, rows, self.chunk, device=rest_CM.device)
        return x_CRn.scatter_(-1, place_CRk, value_CRk).view(clients, -1)[:, : layout.size]

    def _positions(self, choice_CR: Tensor) -> Tensor:
        """Undo the sum of binomials: from the last place down, the largest binomial that still fits."""
        table = _binomials(self.chunk, self.keep).to(choice_CR.device)
        positions = []
        for j in reversed(range(self.keep)):
            # Among equal binomials (zeros) the last counts; a damaged choice stays inside the chunk.
            place_CR = torch.searchsorted(table[j], choice_CR.contiguous(), right=True) - 1
            choice_CR = choice_CR - table[j][place_CR]
            positions.append(place_CR)
        return torch.stack(positions[::-1], -1)
