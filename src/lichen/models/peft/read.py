"""Reads adapters from PEFT's folder format into the run's tensor names.

Whether an adapter can be computed at all is :mod:`lichen.models.peft.config`'s to say; whether it fits a run,
:mod:`lichen.models.peft.start`'s.

Legend: r rank, i in, o out, m virtual tokens, L layers, k key and value heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.tree import Tree, check_same
from lichen.models.adapters.bitfit import BitFit
from lichen.models.adapters.bottleneck import Bottleneck
from lichen.models.adapters.ia3 import IA3
from lichen.models.adapters.lora import Lora, fits
from lichen.models.adapters.prefix_tuning import Prefix
from lichen.models.adapters.prompt import Prompt
from lichen.models.adapters.wrap import Spec
from lichen.models.loading.weights_file import read_tensors
from lichen.models.peft.config import read_config
from lichen.models.peft.format import BARE, PREFIX, VIRTUAL

__all__ = ["load_adapter", "read_adapter"]


def read_adapter(folder: Path, *, spec: Spec | None = None, like: Iterable[str] = ()) -> tuple[Tree, dict[str, Any]]:
    """``(tree, config)`` of a folder written here or by PEFT: LoRA, IA3, prompt or prefix.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        spec: The run's adapter; the folder's must be of its kind.
        like: Names of the run's own tensors; virtual tokens are put under theirs.

    Returns:
        The tensors by the run's names; a vector of IA3 is a row where it scales inputs, else a column, as in PEFT.

    Raises:
        LichenError: if files are missing or damaged, the adapter asks for something that is not computed here, or
            is not of the kind of ``spec``.
    """
    where, like = str(folder), tuple(like)
    config = read_config(folder)
    file, kind = folder / "adapter_model.safetensors", config["peft_type"]
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        fix = "save it again with safe_serialization=True" if pickled else "give a folder that PEFT wrote"
        what = "the adapter is a pickle, which can run code when it is read" if pickled else f"there is no {file.name}"
        raise LichenError(what, where=where, fix=fix)
    raw = read_tensors(file, fix="write it again")
    if spec is not None and not isinstance(spec, _READ[kind]):
        ours, theirs = (next(name for name, of in _KEYS.items() if of is one) for one in (type(spec), _READ[kind]))
        raise LichenError(
            f"the adapter in {where} is of kind {theirs}, the run's is {ours}",
            where="model.adapter.kind",
            fix=f"set it to {theirs}",
        )
    tree: Tree = {}
    for name, x in raw.items():
        if name == VIRTUAL:
            tree |= _read_virtual(x, config, like, where)
            continue
        begin = BARE if VIRTUAL in raw else PREFIX
        if not name.startswith(begin):
            raise LichenError(
                f"tensor {name!r} does not begin with {begin!r}: PEFT would leave it out",
                where=where,
                fix="save the adapter with PEFT's save_pretrained",
            )
        short = name.removeprefix(begin)
        for side in ("lora_A", "lora_B"):
            short = short.removesuffix(".weight") if short.endswith(f".{side}.weight") else short
        tree[short] = x
    for path in sorted({name.rpartition(".")[0] for name in tree if name.endswith((".lora_A", ".lora_B"))}):
        A_ri, B_or = tree.get(f"{path}.lora_A"), tree.get(f"{path}.lora_B")
        whole = A_ri is not None and B_or is not None and A_ri.dim() == B_or.dim() == 2
        if A_ri is None or B_or is None or not whole or A_ri.shape[0] != B_or.shape[1]:
            shapes = " and ".join("none" if x is None else str(tuple(x.shape)) for x in (A_ri, B_or))
            other = next((name for name in tree if name.startswith((f"{path}.lora_A.", f"{path}.lora_B."))), "")
            raise LichenError(
                f"layer {path} has A and B of shapes {shapes}{', and holds ' if other else ''}{other}",
                where=where,
                fix="save the adapter again with PEFT's save_pretrained",
            )
    return tree, config


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
    tree = {name: x.flatten() if name.endswith(".ia3_l") else x for name, x in tree.items()}
    if like is not None:
        check_same(tree, like, where=str(folder))
        tree = {name: x.to(like[name].dtype) for name, x in tree.items()}
    return tree, config


_READ: dict[str, type] = {"LORA": Lora, "IA3": IA3, "PROMPT_TUNING": Prompt, "PREFIX_TUNING": Prefix}
_KEYS: dict[str, type] = {"lora": Lora, "ia3": IA3, "prompt": Prompt, "prefix": Prefix}
_KEYS |= {"bottleneck": Bottleneck, "bitfit": BitFit}
"""What the recipe calls them."""


def _read_virtual(x: Tensor, config: Mapping[str, Any], like: Iterable[str], where: str) -> Tree:
    """PEFT's one tensor, under the names of ``like`` where they are given."""

    def full(end: str) -> str:
        return next((name for name in like if fits(name, (end,))), end)

    layers, heads, wide, count = (
        int(config.get(key) or 0) for key in ("num_layers", "num_attention_heads", "token_dim", "num_virtual_tokens")
    )
    prefix = config["peft_type"] == "PREFIX_TUNING"
    fits_config = x.dim() == 2 and len(x) == (count or len(x))
    if fits_config and prefix:
        fits_config = bool(layers and heads) and x.shape[1] == 2 * layers * (wide or x.shape[1] // (2 * layers))
        fits_config = fits_config and not x.shape[1] % (2 * layers * heads)
    elif fits_config:
        fits_config = x.shape[1] == (wide or x.shape[1])
    if not fits_config:
        sizes = f"num_virtual_tokens={count}, token_dim={wide}"
        sizes += f", num_layers={layers}, num_attention_heads={heads}" if prefix else ""
        raise LichenError(
            f"virtual tokens of shape {tuple(x.shape)} do not fit {sizes}", where=where, fix="save the adapter again"
        )
    if not prefix:
        return {full("prompt.tokens"): x}
    x_mL2kd = x.reshape(x.shape[0], layers, 2, heads, -1)
    return {
        full(f"prefix.{name}"): x_mL2kd[:, :, side].permute(1, 2, 0, 3).contiguous()
        for side, name in enumerate(("keys", "values"))
    }
