"""Merges adapters into a plain transformers model, or writes them beside its weights.

Legend: i in, o out.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.models.adapters.bottleneck import Bottleneck
from lichen.models.adapters.ia3 import IA3
from lichen.models.adapters.lora import Lora, fits, is_linear, oriented
from lichen.models.adapters.prefix_tuning import Prefix
from lichen.models.adapters.prompt import Prompt
from lichen.models.adapters.quantized import is_quantized, refuse_quantized
from lichen.models.adapters.wrap import Spec, wrap
from lichen.models.peft.format import low_rank_layers, patches_by_layer

__all__ = ["attach", "merge"]


def merge(model: Any, tree: Tree, patch: Tree | None = None, *, spec: Spec) -> Any:
    """A plain transformers model with adapter, patch and heads in its weights, ready for ``save_pretrained``.

    Args:
        model: The frozen base, which stays as it was.
        tree: Trainable tensors without client axis.
        patch: ``<layer>.dense`` or ``<layer>.left`` and ``.right``, with or without ``patch.`` before.
        spec: What the run trained.

    Raises:
        LichenError: if a tensor fits no layer, the adapter is of a kind that weights cannot hold, or the base is
            quantised.
    """
    refuse_quantized(model, where="export")
    if isinstance(spec, Prompt | Prefix | Bottleneck):
        raise LichenError(
            f"the weights of a model cannot take in a {type(spec).__name__.lower()} adapter",
            where="export",
            fix="use the adapter as it is",
        )
    merged = copy.deepcopy(model)
    layers, patches = low_rank_layers(tree), patches_by_layer(patch)
    rest = {name: x for name, x in tree.items() if not name.endswith((".lora_A", ".lora_B", ".ia3_l"))}
    scale = spec.scale if isinstance(spec, Lora) else 0.0
    scaled = [name.removesuffix(".ia3_l") for name in tree if name.endswith(".ia3_l")]
    _untie(merged, {*rest, *(f"{path}.weight" for path in (*layers, *patches, *scaled))})
    modules = dict(merged.named_modules())
    with torch.no_grad():
        for path in sorted({*layers, *patches}):
            if path not in modules or not is_linear(modules[path]):
                raise LichenError(f"there is no linear layer {path!r} in the model", where="export")
            weight = modules[path].weight
            change_oi = torch.zeros_like(oriented(modules[path], weight), dtype=torch.float64)
            if path in layers:
                A_ri, B_or = tree[f"{path}.lora_A"].double(), tree[f"{path}.lora_B"].double()
                change_oi += scale * (B_or @ A_ri)
            part = patches.get(path, {})
            if "dense" in part:
                change_oi += part["dense"].double()
            elif part:
                change_oi += part["left"].double() @ part["right"].double()
            weight.copy_((weight.double() + oriented(modules[path], change_oi)).to(weight.dtype))
        if isinstance(spec, IA3):
            _scale(modules, tree, spec)
        parameters = dict(merged.named_parameters(remove_duplicate=False))
        for name, x in rest.items():
            if name not in parameters or parameters[name].shape != x.shape:
                raise LichenError(f"tensor {name!r} fits no weight of the model", where="export")
            parameters[name].copy_(x.to(parameters[name].dtype))
    return merged


def _untie(model: Any, changed: Collection[str]) -> None:
    """A layer that is changed no longer equals the embedding it was tied to."""
    owners: dict[int, list[str]] = {}
    for name, x in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(x), []).append(name)
    for names in owners.values():
        for name in names if len(names) > 1 else ():
            if name in changed:
                path, _, leaf = name.rpartition(".")
                layer = model.get_submodule(path)
                setattr(layer, leaf, torch.nn.Parameter(getattr(layer, leaf).detach().clone(), requires_grad=False))
                model.config.tie_word_embeddings = False


def _scale(modules: Mapping[str, Any], tree: Tree, spec: IA3) -> None:
    """IA3's vectors into rows and bias of the layers whose output they scale, or into columns."""
    for name, l_F in tree.items():
        path = name.removesuffix(".ia3_l")
        if path == name:
            continue
        if path not in modules or not is_linear(modules[path]):
            raise LichenError(f"there is no linear layer {path!r} in the model", where="export")
        layer, inputs = modules[path], fits(path, spec.feedforward)
        factor = (l_F[None] if inputs else l_F[:, None]).double()
        layer.weight.copy_((layer.weight.double() * oriented(layer, factor)).to(layer.weight.dtype))
        if layer.bias is not None and not inputs:
            layer.bias.copy_((layer.bias.double() * l_F.double()).to(layer.bias.dtype))


def attach(model: Any, tree: Tree, patch: Tree | None = None, *, spec: Spec) -> Any:
    """A model that answers, and writes, as the run's does: merged where weights can hold the adapter, else beside them.

    Args:
        model: The frozen base, which stays as it was.
        tree: Trainable tensors without client axis.
        patch: As :func:`merge` takes it.
        spec: What the run trained.

    Raises:
        LichenError: if a tensor fits no layer.
    """
    if not isinstance(spec, Bottleneck | Prompt | Prefix) and not is_quantized(model):
        return merge(model, tree, patch, spec=spec)
    wrapped = wrap(model, spec)
    fixed = {f"patch.{name.removeprefix('patch.')}": x for name, x in (patch or {}).items()}
    for name, x in wrapped.tensors({name: x[None] for name, x in tree.items()}, fixed).items():
        path, _, leaf = name.rpartition(".")
        wrapped.model.get_submodule(path).register_buffer(leaf, x.to(model.device), persistent=False)
    return wrapped.model
