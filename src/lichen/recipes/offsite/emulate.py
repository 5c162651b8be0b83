"""Makes an emulator of a model, at its owner's: a folder to train on that says little of the model's middle.

References:
    Guangxuan Xiao, Ji Lin and Song Han. "Offsite-Tuning: Transfer Learning without Full Model." 2023.
    https://arxiv.org/abs/2302.04870
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from lichen import __version__
from lichen.core.errors import LichenError
from lichen.core.files.durable import whole_folder
from lichen.core.private import share
from lichen.models.loading.emulator_folder import Manifest
from lichen.models.offsite.layers import open_owner_model, save_emulator, stride
from lichen.recipes.artifacts.use import require_empty
from lichen.recipes.offsite.owner import local_folder

__all__ = ["How", "emulate"]

How = Literal["drop", "distil", "low-rank", "raised"]


def emulate(
    model: str,
    *,
    out: Path | str,
    ends: str = "2,2",
    layers: int = 8,
    how: How = "drop",
    say: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Write an emulator's folder.

    Args:
        model: The whole model: a catalog name, folder or hub id.
        out: The new folder.
        ends: First and last blocks, which are the model's own and will be trained, as ``2,2``.
        layers: Blocks of the middle.
        how: How the middle is made.
        say: Called with lines of progress.

    Returns:
        What its manifest says.

    Raises:
        LichenError: if the model cannot be taken apart, or a setting does not fit it.
    """
    out = Path(out)
    require_empty(out)
    both = _pair(ends)
    owner = open_owner_model(local_folder(model, say=say), where="MODEL")
    middle = stride(owner.blocks, both, layers)
    say(f"{owner.blocks} blocks: the first {both[0]} and last {both[1]}, and {layers} of those between")
    provenance = {"model": model, "lichen": __version__}
    with whole_folder(out) as draft:
        manifest = save_emulator(draft, owner, ends=both, middle=middle, how=how, provenance=provenance)
        share(draft)
    return manifest


def _pair(text: str) -> tuple[int, int]:
    parts = text.replace(" ", "").split(",")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        raise LichenError(f"{text!r} is no pair of numbers", where="--ends", fix="such as --ends 2,2")
    return int(parts[0]), int(parts[1])
