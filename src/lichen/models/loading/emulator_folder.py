"""Reads and checks the manifest of an emulator: a model folder that stands in for a larger model.

An emulator has the first and last blocks of a model, its embeddings and its head, and in place of its middle some
blocks that say little of it. It is a plain model folder with one file more, ``emulator.json``, by which whoever opens
it knows that the middle stays as it is, and whoever owns the model knows where the ends belong. Offsite tuning
trains there what the owner puts into the whole model.

References:
    Guangxuan Xiao, Ji Lin and Song Han. "Offsite-Tuning: Transfer Learning without Full Model." 2023.
    https://arxiv.org/abs/2302.04870
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from safetensors.torch import load_file

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.tree import Tree, digest
from lichen.models.loading.model_folder import check_weights, plainly

__all__ = [
    "EMULATOR",
    "KINDS",
    "Manifest",
    "folder_tensors",
    "is_emulator",
    "read_manifest",
    "renumbered",
    "require_untouched",
    "weight_files",
    "write_manifest",
]

EMULATOR = "emulator.json"
"""The manifest's file, in an emulator's folder and beside what was trained on it."""

KINDS = ("drop", "distil", "low-rank", "raised")
"""How a middle may be made."""

_FORMAT = 1
_AGAIN = "get the emulator again from the model's owner, or make it anew: lichen emulate MODEL --out FOLDER"
_HEX = re.compile(r"[0-9a-f]{64}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an emulator is.

    Attributes:
        ends: First and last blocks, which are the model's own.
        middle: Which blocks of the model its middle was made from, by their numbers.
        of: Blocks of the model.
        stack: How the list of blocks is called, below the model that gives hidden states.
        how: How the middle was made: ``drop``, ``distil``, ``low-rank`` or ``raised``.
        model: Digest of all of the model's tensors.
        model_ends: Digest of those of them that the emulator has as they are.
        emulator: Digest of the emulator's tensors.
        provenance: What it was made from and with, for people; nothing reads it.
    """

    ends: tuple[int, int]
    middle: tuple[int, ...]
    of: int
    stack: str
    how: str
    model: str
    model_ends: str
    emulator: str
    provenance: Mapping[str, Any]

    @property
    def blocks(self) -> int:
        """Blocks of the emulator."""
        return sum(self.ends) + len(self.middle)

    def in_model(self, block: int) -> int | None:
        """The number in the model of one of the emulator's end blocks; None for one of its middle."""
        first, last = self.ends
        if block < first:
            return block
        return block - self.blocks + self.of if block >= self.blocks - last else None

    def in_emulator(self, block: int) -> int | None:
        """The number in the emulator of a block of the model's ends; None for one of the middle."""
        first, last = self.ends
        if block < first:
            return block
        return block - self.of + self.blocks if block >= self.of - last else None


def is_emulator(folder: Path) -> bool:
    """Whether a folder is an emulator's, or holds what was trained on one."""
    return (folder / EMULATOR).is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a folder.

    Raises:
        LichenError: if there is none, or it is damaged.
    """
    file = folder / EMULATOR
    if not file.is_file():
        raise LichenError(f"has no {EMULATOR}", where=str(folder), fix="name an emulator, or what was trained on one")
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise LichenError(f"{EMULATOR} cannot be read: {reason}", where=str(folder), fix=_AGAIN) from None
    return _checked(found, folder)


def _checked(found: object, folder: Path) -> Manifest:
    def damaged(what: str) -> LichenError:
        return LichenError(f"{EMULATOR} is damaged: {what}", where=str(folder), fix=_AGAIN)

    names = {"format", *Manifest.__slots__}
    if not isinstance(found, dict):
        raise damaged("it holds no named fields")
    if found.get("format") != _FORMAT or isinstance(found.get("format"), bool):
        raise damaged(f"it is of format {found.get('format')!r}, and {_FORMAT} is known here")
    if found.keys() != names:
        raise damaged(f"{sorted(found.keys() ^ names)[0]!r} is missing or unknown")
    ends, middle, of = found["ends"], found["middle"], found["of"]
    numbers = [*ends, *middle, of] if isinstance(ends, list) and isinstance(middle, list) else [None]
    if not all(type(one) is int and 0 <= one <= 100_000 for one in numbers) or len(ends) != 2 or not middle:
        raise damaged("ends, middle and of are no numbers of blocks")
    first, last = ends
    inside = all(first <= one < of - last for one in middle) and list(middle) == sorted(set(middle))
    if not (first + last and inside):
        raise damaged(f"ends {first} and {last} and the middle's blocks do not fit into {of} blocks")
    for name in ("model", "model_ends", "emulator"):
        if not isinstance(found[name], str) or not _HEX.fullmatch(found[name]):
            raise damaged(f"{name} is no digest")
    stack, how = found["stack"], found["how"]
    if not isinstance(stack, str) or not re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", stack) or how not in KINDS:
        raise damaged("stack is no name, or how is unknown")
    if not isinstance(found["provenance"], dict):
        raise damaged("provenance holds no named fields")
    more = {name: found[name] for name in ("of", "stack", "how", "model", "model_ends", "emulator", "provenance")}
    return Manifest(ends=(first, last), middle=tuple(middle), **more)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest into a folder that is to be given away."""
    text = json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=2) + "\n"
    write_atomic(folder / EMULATOR, text.encode(), shared=True)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold a model folder's weights, in the order of their names.

    Raises:
        LichenError: if weights are missing or damaged.
    """
    return tuple(sorted(set(check_weights(folder).values())))


def folder_tensors(folder: Path) -> Tree:
    """All tensors of a model folder, buffers among them, under the names of its files.

    Raises:
        LichenError: if the weights are missing or damaged.
    """
    tensors, files = Tree(), weight_files(folder)
    with plainly("cannot read the weights", where=str(folder), fix="fetch or save the folder again, whole"):
        for file in files:
            tensors |= load_file(file)
    return tensors


def require_untouched(folder: Path, manifest: Manifest) -> Tree:
    """An emulator's tensors, which must be those that it was handed out with.

    Raises:
        LichenError: if they are others.
    """
    tensors = folder_tensors(folder)
    if digest(tensors) != manifest.emulator:
        raise LichenError(
            "holds other weights than the emulator was handed out with, so that nothing trained on it would fit",
            where=str(folder),
            fix=_AGAIN,
        )
    return tensors


def renumbered(name: str, stack: str, number: Mapping[int, int | None]) -> str | None:
    """A tensor's or layer's name with its block's number changed; None where the block has no place there.

    Args:
        name: Of a tensor, with whatever stands before the stack's own name.
        stack: As :attr:`Manifest.stack`.
        number: The new number by the old one; None or missing: no place.

    >>> renumbered("model.layers.5.mlp.weight", "layers", {5: 29}), renumbered("lm_head.weight", "layers", {})
    ('model.layers.29.mlp.weight', 'lm_head.weight')
    """
    found = re.match(rf"(?P<before>(?:.*?\.)??{re.escape(stack)}\.)(?P<block>\d+)(?P<after>(?:\..*)?)$", name)
    if found is None:
        return name
    new = number.get(int(found["block"]))
    return None if new is None else f"{found['before']}{new}{found['after']}"
