"""Takes a model apart by blocks, and makes an emulator's folder of it, its middle at a uniform stride.

Both read and write the tensors of a folder, so that what nobody trains keeps its bytes, its dtype and its name.

References:
    Guangxuan Xiao, Ji Lin and Song Han. "Offsite-Tuning: Transfer Learning without Full Model." 2023.
    https://arxiv.org/abs/2302.04870
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from safetensors.torch import save_file

from lichen.core.errors import LichenError
from lichen.core.tree import Tree, digest, plain
from lichen.models.loading.emulator_folder import (
    EMULATOR,
    Manifest,
    folder_tensors,
    is_emulator,
    renumbered,
    write_manifest,
)
from lichen.models.loading.load import read_config

__all__ = [
    "TOKENIZER_FILES",
    "OwnerModel",
    "open_owner_model",
    "save_emulator",
    "stride",
]

TOKENIZER_FILES = re.compile(
    r"(tokenizer|vocab|merges|special_tokens_map|added_tokens|generation_config|spiece|sentencepiece).*|.*\.jinja|LICEN[CS]E.*"
)
"""Files that stand beside weights and configuration, and go with them into another folder."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerModel:
    """A whole model, as its owner has it in a folder.

    Attributes:
        folder: The folder.
        tensors: All of its tensors, by the names of its files.
        blocks: How many blocks it has.
        stack: How the list of blocks is called, below the model that gives hidden states.
        count_key: What ``config.json`` calls the number of blocks.
    """

    folder: Path
    tensors: Tree
    blocks: int
    stack: str
    count_key: str

    def ends_of(self, ends: tuple[int, int]) -> Tree:
        """The tensors that an emulator has as they are: all outside the middle."""
        outside = {i: i for i in range(self.blocks) if i < ends[0] or i >= self.blocks - ends[1]}
        return {name: x for name, x in self.tensors.items() if renumbered(name, self.stack, outside) is not None}


def stride(blocks: int, ends: tuple[int, int], layers: int) -> tuple[int, ...]:
    """Which blocks a middle of so many layers is made from: evenly apart, the middle's first and last among them.

    Args:
        blocks: Of the model.
        ends: Its first and last blocks, which are left out.
        layers: Of the emulator's middle.

    Raises:
        LichenError: if the ends leave no middle, or a smaller one.

    >>> stride(30, (2, 2), 8)
    (2, 6, 9, 13, 16, 20, 23, 27)
    >>> stride(6, (1, 1), 1)
    (3,)
    """
    middle = blocks - sum(ends)
    if min(ends) < 0 or not sum(ends):
        raise LichenError(
            f"ends {ends[0]} and {ends[1]} leave nothing to train",
            where="--ends",
            fix="use 2,2, or as many as there are",
        )
    if middle < 1:
        what = f"ends {ends[0]} and {ends[1]} leave no middle of {blocks} blocks"
        raise LichenError(what, where="--ends", fix="use smaller ends, or a deeper model")
    if not 1 <= layers <= middle:
        what = f"a middle of {middle} blocks gives no {layers}"
        raise LichenError(what, where="--layers", fix=f"use 1 to {middle}")
    if layers == 1:
        return (ends[0] + middle // 2,)
    return tuple(ends[0] + round(at * (middle - 1) / (layers - 1)) for at in range(layers))


def open_owner_model(folder: Path, *, where: str) -> OwnerModel:
    """Read a model's folder, and find its blocks.

    Args:
        folder: It exists.
        where: What names the model, for errors.

    Raises:
        LichenError: if it is no model, is an emulator itself, or its blocks cannot be told apart.
    """
    if is_emulator(folder):
        what = f"is an emulator itself ({EMULATOR} lies in it)"
        raise LichenError(f"{folder} {what}", where=where, fix="name the whole model")
    config = read_config(folder)
    key = str(getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers"))
    blocks = int(getattr(config, "num_hidden_layers", 0) or 0)
    return _owner_model(folder, folder_tensors(folder), blocks=blocks, count_key=key, family=str(config.model_type))


def _owner_model(folder: Path, tensors: Tree, *, blocks: int, count_key: str, family: str) -> OwnerModel:
    """The same of tensors at hand.

    Raises:
        LichenError: if the blocks cannot be told apart.
    """
    numbers: dict[str, set[int]] = {}
    for name in tensors:
        if found := re.match(r"(?P<stack>(?:[a-z_]+\.)*[a-z_]+)\.(?P<block>\d+)\.", name):
            numbers.setdefault(found["stack"], set()).add(int(found["block"]))
    stacks = [stack for stack, seen in numbers.items() if blocks and seen == set(range(blocks))]
    if len(stacks) != 1:
        raise LichenError(
            f"the blocks of a {family} cannot be told apart",
            where=str(folder),
            fix="use a Llama, Qwen2, GPT-2, BERT or DistilBERT, or another model with one stack of blocks",
        )
    # Files of a bare encoder lack what those of a classifier put before its names.
    stack = _below_base(stacks[0], family)
    return OwnerModel(folder=folder, tensors=tensors, blocks=blocks, stack=stack, count_key=count_key)


def _below_base(stack: str, family: str) -> str:
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    kind = CONFIG_MAPPING[family]
    model = MODEL_MAPPING.get(kind, None)
    prefix = str(model.base_model_prefix) if isinstance(model, type) else ""
    return stack.removeprefix(f"{prefix}.") if prefix and stack.startswith(f"{prefix}.") else stack


def _emulator_config(config: Mapping[str, Any], owner: OwnerModel, chosen: Sequence[int]) -> dict[str, Any]:
    """``config.json`` of a model of these blocks alone; what it says of each block goes with it."""
    found = dict(config)
    for name, value in config.items():
        if isinstance(value, list) and len(value) == owner.blocks and "layer" in name:
            found[name] = [value[i] for i in chosen]
    return found | {owner.count_key: len(chosen)}


def save_emulator(
    folder: Path,
    owner: OwnerModel,
    *,
    ends: tuple[int, int],
    middle: Sequence[int],
    how: str,
    provenance: Mapping[str, Any],
    changed: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write an emulator's folder: weights, configuration, tokenizer, manifest.

    Args:
        folder: It exists, and is empty.
        owner: The whole model.
        ends: First and last blocks.
        middle: Blocks of the model that stand in the emulator's middle, in their order.
        how: How it was made.
        provenance: What it was made from, and with.
        changed: Tensors of the middle that are no longer the model's, by the emulator's names.

    Returns:
        What the manifest says.
    """
    chosen = (*range(ends[0]), *middle, *range(owner.blocks - ends[1], owner.blocks))
    number = {block: at for at, block in enumerate(chosen)}
    named = {new: x for name, x in owner.tensors.items() if (new := renumbered(name, owner.stack, number)) is not None}
    tensors = plain({**named, **(changed or {})})
    for file in sorted(owner.folder.iterdir()):
        if file.is_file() and TOKENIZER_FILES.fullmatch(file.name):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((owner.folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(_emulator_config(config, owner, chosen), indent=2) + "\n", "utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    manifest = Manifest(
        ends=ends,
        middle=tuple(middle),
        of=owner.blocks,
        stack=owner.stack,
        how=how,
        model=digest(owner.tensors),
        model_ends=digest(owner.ends_of(ends)),
        emulator=digest(tensors),
        provenance=provenance,
    )
    write_manifest(folder, manifest)
    return manifest
