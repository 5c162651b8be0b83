"""Lays several tensors out in one vector.

A codec sees one long vector a client: all tensors of a message in name order. The layout is what both
sides know of it beforehand, so that nothing of it has to be sent but a few digits that prove it is the same.

Legend: C clients, N numbers of one client's message.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import final

import torch
from torch import Tensor

from lichen.core.tree import Tree

__all__ = ["Entry", "Layout"]

Entry = tuple[str, tuple[int, ...], torch.dtype]
"""Name, shape without client axis, and the dtype it has outside the vector."""


@final
@dataclass(frozen=True, slots=True)
class Layout:
    """Names, shapes and dtypes, in name order.

    Args:
        entries: One for each tensor.
    """

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, tree: Mapping[str, Tensor], *, stacked: bool = False) -> Layout:
        """The layout of these tensors.

        Args:
            tree: What is to lie side by side.
            stacked: Whether the tensors have a leading client axis, which is no part of a layout.

        >>> Layout.of({"b": torch.zeros(2, 3), "a": torch.zeros(4)}).size
        10
        """
        return cls(tuple((name, tuple(tree[name].shape[stacked:]), tree[name].dtype) for name in sorted(tree)))

    @classmethod
    def vector(cls, size: int) -> Layout:
        """Numbers without further structure."""
        return cls((("", (size,), torch.float32),))

    @property
    def size(self) -> int:
        """N."""
        return sum(prod(shape) for _, shape, _ in self.entries)

    @property
    def digest(self) -> str:
        """Eight hex digits that differ where two layouts do."""
        text = json.dumps([(name, shape, str(dtype)) for name, shape, dtype in self.entries])
        return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()

    def flatten(self, tree_C: Mapping[str, Tensor]) -> Tensor:
        """Stacked tensors as ``(C, N)`` float32."""
        rows = [tree_C[name] for name, _, _ in self.entries]
        return torch.cat([x.detach().reshape(x.shape[0], -1).float() for x in rows], 1)

    def by_name(self, x_CN: Tensor) -> Tree:
        """Undo :meth:`flatten`, still float32: views of ``x_CN``."""
        pieces = torch.split(x_CN, [prod(shape) for _, shape, _ in self.entries], 1)
        return {
            name: piece.reshape(x_CN.shape[0], *shape)
            for (name, shape, _), piece in zip(self.entries, pieces, strict=True)
        }

    def unflatten(self, x_CN: Tensor) -> Tree:
        """Undo :meth:`flatten`, each tensor in its own dtype."""
        by_name = self.by_name(x_CN)
        return {name: by_name[name].to(dtype) for name, _, dtype in self.entries}
