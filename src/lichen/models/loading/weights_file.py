"""Reads a safetensors file, or says in one sentence what is wrong with it.

The header says what the file must hold, so that a file that was cut short, or is none at all, is told before
anything is read. Weights that are not finite would make every answer not finite: they are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["check_file", "read_tensors", "refuse_not_finite"]

_LONGEST = 100_000_000
"""Bytes of a header that safetensors reads at most."""


def check_file(file: Path, *, fix: str) -> dict[str, Any]:
    """The header of a safetensors file: what it holds, by tensor.

    Args:
        file: The file, which exists.
        fix: What the reader can do about a damaged one.

    Raises:
        LichenError: if the file is empty, cut short, longer than it says, or no safetensors file.
    """
    where = str(file)

    def damaged(what: str) -> LichenError:
        return LichenError(f"the file is damaged: {what}", where=where, fix=fix)

    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            begin = stream.read(8)
            length = int.from_bytes(begin, "little")
            text = stream.read(length) if length <= min(size, _LONGEST) else b""
    except OSError as error:
        raise LichenError(f"cannot read the file: {error.strerror}", where=where, fix=fix) from None
    if not size:
        raise damaged("it is empty")
    if begin == b"version ":
        raise LichenError(
            "the file is a pointer of Git LFS, not the weights", where=where, fix="fetch it with git lfs pull"
        )
    if len(begin) < 8 or len(text) < length:
        raise damaged("it is cut short, or no safetensors file")
    try:
        header = json.loads(text)
        tensors = {name: about["data_offsets"] for name, about in header.items() if name != "__metadata__"}
        end = max((int(stop) for _, stop in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise damaged("its header cannot be read") from None
    expected = 8 + length + end
    if size != expected:
        raise damaged(f"it has {size:,} bytes where its header says {expected:,}")
    header.pop("__metadata__", None)
    return dict(header)


def read_tensors(file: Path, *, fix: str) -> Tree:
    """Every tensor of a safetensors file.

    Args:
        file: The file, which exists.
        fix: What the reader can do about a damaged one.

    Raises:
        LichenError: as :func:`check_file`; for tensors that are no real numbers, or are not finite.
    """
    check_file(file, fix=fix)
    try:
        tree = load_file(file)
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise LichenError(f"the file is damaged: {reason}", where=str(file), fix=fix) from None
    for name, x in tree.items():
        if not x.is_floating_point():
            kind = str(x.dtype).removeprefix("torch.")
            raise LichenError(f"tensor {name!r} holds {kind}, not real numbers", where=str(file), fix=fix)
    refuse_not_finite(tree.items(), where=str(file), fix=fix)
    return tree


def refuse_not_finite(tensors: Iterable[tuple[str, Tensor]], *, where: str, fix: str) -> None:
    """Say which tensor has values that are not a number or infinite.

    Args:
        tensors: Names and tensors; those of whole numbers are passed over.
        where: The file or key that errors name.
        fix: What the reader can do about it.

    Raises:
        LichenError: naming the first such tensor, and how many of its values are bad.
    """
    for name, x in tensors:
        if not x.is_floating_point() or not x.numel():
            continue
        # One pass and no copy; eight-bit floats know no smallest and largest.
        low, high = torch.aminmax(x if x.element_size() > 1 else x.float())
        if not (bool(low.isfinite()) and bool(high.isfinite())):
            bad = int((~x.float().isfinite()).sum())
            raise LichenError(
                f"tensor {name!r} has {bad:,} of {x.numel():,} values that are not finite", where=where, fix=fix
            )
