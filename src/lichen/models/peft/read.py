"""Reads adapters from PEFT's folder format into the run's tensor names.

Whether an adapter can be computed at all is :mod:`lichen.models.peft.config`'s to say; whether it fits a run,
:mod:`lichen.models.peft.start`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.core.tree import Tree, check_same
from lichen.models.adapters.kind import BEFORE_LAYERS, BEFORE_VIRTUAL, VIRTUAL, Spec
from lichen.models.loading.weights_file import read_tensors
from lichen.models.peft.config import read_adapter_config

__all__ = ["load_adapter", "read_adapter"]


def read_adapter(folder: Path, *, spec: Spec | None = None, like: Iterable[str] = ()) -> tuple[Tree, dict[str, Any]]:
    """``(tree, config)`` of a folder written here or by PEFT, of any kind that PEFT has.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        spec: The run's adapter; the folder's must be of its kind.
        like: Names of the run's own tensors; virtual tokens are put under theirs.

    Returns:
        The tensors by the run's names.

    Raises:
        LichenError: if files are missing or damaged, the adapter asks for something that is not computed here, or
            is not of the kind of ``spec``.
    """
    where, like = str(folder), tuple(like)
    config, kind, peft_format = read_adapter_config(folder, None if spec is None else spec.kind)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        fix = "save it again with safe_serialization=True" if pickled else "give a folder that PEFT wrote"
        what = "the adapter is a pickle, which can run code when it is read" if pickled else f"there is no {file.name}"
        raise LichenError(what, where=where, fix=fix)
    raw = read_tensors(file, fix="write it again")
    if spec is not None and spec.kind is not kind:
        ours, theirs = spec.kind.facts.word, kind.facts.word
        raise LichenError(
            f"the adapter in {where} is of kind {theirs}, the run's is {ours}",
            where="model.adapter.kind",
            fix=f"set it to {theirs}",
        )
    begin = BEFORE_VIRTUAL if VIRTUAL in raw else BEFORE_LAYERS
    tensors: Tree = {}
    for name, x in raw.items():
        if name != VIRTUAL and not name.startswith(begin):
            raise LichenError(
                f"tensor {name!r} does not begin with {begin!r}: PEFT would leave it out",
                where=where,
                fix="save the adapter with PEFT's save_pretrained",
            )
        tensors[name.removeprefix(begin)] = x
    return peft_format.read(tensors, config, like, where), config


def load_adapter(folder: Path, *, like: Tree | None = None, spec: Spec | None = None) -> tuple[Tree, dict[str, Any]]:
    """``(tree, config)`` of an adapter that a run of exactly this shape has written.

    Args:
        folder: As :func:`read_adapter` takes it.
        like: The run's own start tensors; the adapter must have their names and shapes.
        spec: The run's adapter; the folder's must be of its kind.

    Raises:
        LichenError: as :func:`read_adapter`, or if a tensor is missing, unexpected or of another shape.
    """
    tree, config = read_adapter(folder, spec=spec, like=like or ())
    if like is not None:
        check_same(tree, like, where=str(folder))
        tree = {name: x.to(like[name].dtype) for name, x in tree.items()}
    return tree, config
