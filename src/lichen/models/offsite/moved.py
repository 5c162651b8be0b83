"""Moves what was trained on an emulator's ends to the numbers that these blocks have in the whole model.

Nothing but names changes: tensors, and the lists and patterns of PEFT's configuration that name layers.

References:
    Guangxuan Xiao, Ji Lin and Song Han. "Offsite-Tuning: Transfer Learning without Full Model." 2023.
    https://arxiv.org/abs/2302.04870
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.models.adapters.linear_layers import fits
from lichen.models.loading.emulator_folder import Manifest, renumbered

__all__ = ["moved_config", "moved_tree"]

_LISTS = ("target_modules", "feedforward_modules", "modules_to_save", "exclude_modules")
_PATTERNS = ("rank_pattern", "alpha_pattern")


def _moved(name: str, manifest: Manifest, where: str) -> str:
    number = {block: manifest.in_model(block) for block in range(manifest.blocks)}
    new = renumbered(name, manifest.stack, number)
    if new is None:
        raise LichenError(
            f"{name} was trained in the middle of the emulator, which has no place in the model",
            where=where,
            fix=f"train its first {manifest.ends[0]} and last {manifest.ends[1]} blocks alone",
        )
    return new


def moved_tree(tree: Mapping[str, Tensor], manifest: Manifest, *, where: str) -> Tree:
    """The tensors under the names that they have in the whole model.

    Args:
        tree: Trained on the emulator, with whatever stands before a layer's name.
        manifest: The emulator's.
        where: What holds them, for errors.

    Raises:
        LichenError: if one lies in the emulator's middle.
    """
    return {_moved(name, manifest, where): x for name, x in tree.items()}


def moved_config(config: Mapping[str, Any], names: Iterable[str], manifest: Manifest, *, where: str) -> dict[str, Any]:
    """PEFT's configuration for the whole model, every adapted layer by its full name.

    An end of a name would fit the middle's layers, too.

    Args:
        config: Of the adapter on the emulator.
        names: The adapter's tensors, without what PEFT writes before them.
        manifest: The emulator's.
        where: The adapter's folder, for errors.

    Raises:
        LichenError: if it names layers otherwise than by lists, or such of the middle.
    """
    found, paths = dict(config), _paths(names)
    for key in _LISTS:
        value = config.get(key)
        if value is None or value == []:
            continue
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise LichenError(f"{key} is no list of names", where=where, fix="save the adapter with a list of names")
        layers = {path for path in paths if fits(path, value)}
        heads = {end for end in value if "." not in end} if key == "modules_to_save" else set()
        found[key] = sorted(heads or {_moved(path, manifest, where) for path in layers})
    if config.get("layers_to_transform") is not None:
        found |= {"layers_to_transform": None, "layers_pattern": None}  # every layer has its full name by now
    for key in _PATTERNS:
        if isinstance(config.get(key), dict):
            found[key] = {_moved(name, manifest, where): value for name, value in config[key].items()}
    return found


def _paths(names: Iterable[str]) -> set[str]:
    """Every module that one of these tensors lies in."""
    return {".".join(parts[:n]) for name in names if (parts := name.split(".")) for n in range(1, len(parts))}
