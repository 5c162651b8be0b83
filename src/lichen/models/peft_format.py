"""Adapters in PEFT's own folder format, and merged models for those who want no adapter at all.

A factored patch of the frozen weights is written as more rank: with ``s = alpha / r``,
``left right + s B A = s [B, left / s] [A; right]``. That pays while the joined rank stays below half
of the layer's smaller side; past that, and for a dense patch, only a merged model is honest.

References:
    Mangrulkar, Gugger, Debut, Belkada, Paul and Bossan (2022). PEFT: State-of-the-art
    Parameter-Efficient Fine-Tuning methods. https://github.com/huggingface/peft
    Singhal, Ponkshe and Vepakomma (2025). FedEx-LoRA: Exact Aggregation for Federated and Efficient
    Fine-Tuning of Large Language Models. ACL 2025, arXiv:2410.09432.

Legend: r rank, i in, o out, R rank of a factored patch.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.store import write_atomic
from lichen.core.tree import Tree, check_same
from lichen.models.lora import is_linear, oriented

__all__ = ["load_adapter", "merge", "save_adapter"]

_PREFIX = "base_model.model."


def _layers(tree: Mapping[str, Tensor]) -> list[str]:
    return sorted(name.removesuffix(".lora_A") for name in tree if name.endswith(".lora_A"))


def _patches(patch: Mapping[str, Tensor] | None) -> dict[str, dict[str, Tensor]]:
    """By layer, then by kind; names may carry the ``patch.`` they have in a job."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, x in (patch or {}).items():
        path, _, kind = name.removeprefix("patch.").rpartition(".")
        if x.numel():
            found.setdefault(path, {})[kind] = x
    return found


def _joined(path: str, A_ri: Tensor, B_or: Tensor, part: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """A and B with the patch as more rank."""
    fix = "export a merged model instead"
    if "dense" in part:
        raise LichenError(f"the patch of layer {path} is dense and fits no adapter", where="export", fix=fix)
    left_oR, right_Ri = part["left"].double(), part["right"].double()
    rank = A_ri.shape[0] + right_Ri.shape[0]
    if rank >= min(A_ri.shape[1], B_or.shape[0]) / 2:
        raise LichenError(f"layer {path} would need an adapter of rank {rank}", where="export", fix=fix)
    A = torch.cat([A_ri.double(), right_Ri]).to(A_ri.dtype)
    return A, torch.cat([B_or.double(), left_oR / scale], dim=1).to(B_or.dtype)


def save_adapter(
    folder: Path,
    tree: Tree,
    *,
    base_name: str,
    targets: Sequence[str] | str,
    rank: int,
    alpha: float,
    task: str,
    modules_to_save: Sequence[str] = (),
    patch: Tree | None = None,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, which ``PeftModel.from_pretrained`` reads.

    Args:
        folder: Where to; made if need be.
        tree: The run's trainable tensors without client axis.
        base_name: Folder or hub id of the base model, for the config.
        targets: As the run had them; written in full where they are ``"all-linear"``.
        rank: The run's rank.
        alpha: The run's alpha.
        task: ``"CAUSAL_LM"`` or ``"SEQ_CLS"``.
        modules_to_save: The run's heads.
        patch: The run's patch, factored.

    Raises:
        LichenError: if the tree has no adapter, or the patch does not fit as more rank.
    """
    from peft import LoraConfig

    layers, patches, scale = _layers(tree), _patches(patch), alpha / rank
    if not layers:
        raise LichenError("there is no low-rank adapter to write", where="export", fix="export a merged model instead")
    stray = sorted(patches.keys() - set(layers))
    if stray:
        raise LichenError(f"the patch of layer {stray[0]} has no adapter beside it", where="export")
    tensors: Tree = {}
    ranks: dict[str, int] = {}
    for path in layers:
        A_ri, B_or = tree[f"{path}.lora_A"], tree[f"{path}.lora_B"]
        if path in patches:
            A_ri, B_or = _joined(path, A_ri, B_or, patches[path], scale)
            ranks[path] = A_ri.shape[0]
        tensors[f"{_PREFIX}{path}.lora_A.weight"], tensors[f"{_PREFIX}{path}.lora_B.weight"] = A_ri, B_or
    for name in tree.keys() - {f"{path}.lora_{x}" for path in layers for x in "AB"}:
        tensors[_PREFIX + name] = tree[name]
    names = layers if isinstance(targets, str) else sorted(targets)
    config: Any = LoraConfig(
        task_type=task,
        base_model_name_or_path=base_name,
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=names,
        modules_to_save=list(modules_to_save) or None,
        rank_pattern=ranks,
        alpha_pattern={path: scale * joined for path, joined in ranks.items()},
        inference_mode=True,
    )
    plain = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    write_atomic(folder / "adapter_model.safetensors", save(plain, metadata={"format": "pt"}))
    text = config.to_dict() | {"target_modules": names}
    write_atomic(folder / "adapter_config.json", json.dumps(text, indent=2, sort_keys=True, default=str).encode())


def load_adapter(folder: Path, *, like: Tree | None = None) -> tuple[Tree, dict[str, Any]]:
    """``(tree, config)`` of a LoRA folder written here or by PEFT.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        like: The run's own start tensors; the adapter must have their names and shapes.

    Raises:
        LichenError: if files are missing or damaged, the adapter is of a kind not supported here, or
            a layer's tensors do not fit.
    """
    where = str(folder)
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
        raw = load_file(folder / "adapter_model.safetensors")
    except FileNotFoundError as error:
        missing = Path(str(error.filename or "adapter_model.safetensors")).name
        raise LichenError(f"there is no {missing}", where=where, fix="give a folder that PEFT wrote") from None
    except (ValueError, OSError, SafetensorError) as error:
        raise LichenError(f"the adapter is damaged: {error}", where=where, fix="write it again") from None
    for key, plain in (("peft_type", "LORA"), ("use_dora", False), ("use_rslora", False), ("bias", "none")):
        if config.get(key, plain) != plain:
            raise LichenError(f"the adapter has {key}={config[key]!r}", where=where, fix=f"only {plain!r} is supported")
    tree: Tree = {}
    for name, x in raw.items():
        short = name.removeprefix(_PREFIX)
        for side in ("lora_A", "lora_B"):
            short = short.removesuffix(".weight") if short.endswith(f".{side}.weight") else short
        tree[short] = x
    for path in _layers(tree):
        A_ri, B_or = tree[f"{path}.lora_A"], tree.get(f"{path}.lora_B")
        if B_or is None or A_ri.dim() != 2 or B_or.dim() != 2 or A_ri.shape[0] != B_or.shape[1]:
            shapes = tuple(A_ri.shape), None if B_or is None else tuple(B_or.shape)
            raise LichenError(f"layer {path} has A and B of shapes {shapes[0]} and {shapes[1]}", where=where)
    if like is not None:
        check_same(tree, like, where=where)
        tree = {name: x.to(like[name].dtype) for name, x in tree.items()}
    return tree, config


def merge(model: Any, tree: Tree, patch: Tree | None = None, *, alpha: float) -> Any:
    """A plain transformers model with adapter, patch and heads in its weights, ready for ``save_pretrained``.

    Args:
        model: The frozen base, which stays as it was.
        tree: Trainable tensors without client axis.
        patch: ``<layer>.dense`` or ``<layer>.left`` and ``.right``, with or without ``patch.`` before.
        alpha: The run's alpha; the rank is read from the tensors.

    Raises:
        LichenError: if a tensor fits no layer.
    """
    merged = copy.deepcopy(model)
    layers, patches = _layers(tree), _patches(patch)
    rest = {name: x for name, x in tree.items() if not name.endswith((".lora_A", ".lora_B"))}
    _untie(merged, rest)
    modules = dict(merged.named_modules())
    with torch.no_grad():
        for path in sorted({*layers, *patches}):
            if path not in modules or not is_linear(modules[path]):
                raise LichenError(f"there is no linear layer {path!r} in the model", where="export")
            weight = modules[path].weight
            change_oi = torch.zeros_like(oriented(modules[path], weight), dtype=torch.float64)
            if path in layers:
                A_ri, B_or = tree[f"{path}.lora_A"].double(), tree[f"{path}.lora_B"].double()
                change_oi += alpha / A_ri.shape[0] * (B_or @ A_ri)
            part = patches.get(path, {})
            if "dense" in part:
                change_oi += part["dense"].double()
            elif part:
                change_oi += part["left"].double() @ part["right"].double()
            weight.copy_((weight.double() + oriented(modules[path], change_oi)).to(weight.dtype))
        parameters = dict(merged.named_parameters(remove_duplicate=False))
        for name, x in rest.items():
            if name not in parameters or parameters[name].shape != x.shape:
                raise LichenError(f"tensor {name!r} fits no weight of the model", where="export")
            parameters[name].copy_(x.to(parameters[name].dtype))
    return merged


def _untie(model: Any, heads: Tree) -> None:
    """A head trained whole no longer equals the embedding it was tied to."""
    owners: dict[int, list[str]] = {}
    for name, x in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(x), []).append(name)
    for names in owners.values():
        for name in names if len(names) > 1 else ():
            if name in heads:
                path, _, leaf = name.rpartition(".")
                layer = model.get_submodule(path)
                setattr(layer, leaf, torch.nn.Parameter(getattr(layer, leaf).detach().clone(), requires_grad=False))
                model.config.tie_word_embeddings = False
