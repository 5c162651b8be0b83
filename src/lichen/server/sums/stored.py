"""The sums of a one-shot run as they stay in its folder, and the sums without one client.

What a head is solved from is a sum of integers over clients. A client's part, computed again from its rows, is taken
off it exactly: what is left has the bytes of a sum to which that client never added anything.
"""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.server.sums import fixed_point
from lichen.server.sums.fixed_point import FixedSum

__all__ = ["SUMS", "dump_sums", "load_sums", "minus"]

SUMS = "sums"
"""What they are called among a run's trees."""

_HEADER, _BYTES = "header", "bytes"


def dump_sums(total: FixedSum, *, up: int, down: int) -> Tree:
    """The sums as a tree, and the bytes by which they came.

    Args:
        total: Of all clients.
        up: Bytes to the server.
        down: Bytes from it.
    """
    tensors, header = fixed_point.dump(total)
    text = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    return {**tensors, _HEADER: text, _BYTES: torch.tensor([up, down])}


def load_sums(tree: Tree) -> tuple[FixedSum, int, int]:
    """Undo :func:`dump_sums`: ``(total, bytes up, bytes down)``.

    Raises:
        LichenError: if these are no sums.
    """
    try:
        header = json.loads(tree[_HEADER].numpy().tobytes())
        up, down = tree[_BYTES].tolist()
    except (KeyError, ValueError) as error:
        raise LichenError(f"these are no sums: {error!r}", where="sums", fix="run again") from None
    return fixed_point.load(tree, header), int(up), int(down)


def minus(total: FixedSum, part: FixedSum) -> FixedSum:
    """A sum without what some of its clients have added.

    Args:
        total: Of all of them.
        part: Of those that go; each was added to ``total`` once.

    Raises:
        LichenError: if ``part`` is no part of it: of other tensors, or of more clients.
    """
    if part.units_N is None:
        return total
    alike = (total.group, total.layout, total.scale, total.lifted) == (part.group, part.layout, part.scale, 0)
    if not alike or total.units_N is None or not part.count < total.count:
        raise LichenError("is no part of the sums", where="sums", fix="run the recipe anew with federation.absent")
    return replace(
        total,
        count=total.count - part.count,
        weight=total.weight - part.weight,
        bound=total.bound - part.bound,
        units_N=total.units_N - part.units_N,
    )
