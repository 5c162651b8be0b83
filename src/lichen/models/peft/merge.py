"""Merges adapters into a plain transformers model, or writes them beside its weights.

Legend: i in, o out.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.models.adapters.kind import Spec
from lichen.models.adapters.linear_layers import is_linear, oriented
from lichen.models.adapters.quantized import is_quantized, refuse_quantized
from lichen.models.adapters.wrap import wrap
from lichen.models.peft.format import patches_by_layer

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
    kind = spec.kind
    if kind.merge is None:
        raise LichenError(
            f"the weights of a model cannot take in a {type(spec).__name__.lower()} adapter",
            where="export",
            fix="use the adapter as it is",
        )
    merged, patches = copy.deepcopy(model), patches_by_layer(patch)
    own: dict[str, Tree] = {}
    rest: Tree = {}
    for name, x in tree.items():
        path, _, leaf = name.rpartition(".")
        if leaf in kind.tensors:
            own.setdefault(path, {})[leaf] = x
        else:
            rest[name] = x
    layers = sorted({*own, *patches})
    _untie(merged, {*rest, *(f"{path}.weight" for path in layers)})
    modules = dict(merged.named_modules())
    with torch.no_grad():
        for path in layers:
            if path not in modules or not is_linear(modules[path]):
                raise LichenError(f"there is no linear layer {path!r} in the model", where="export")
            layer = modules[path]
            change_oi = _patch(layer, patches.get(path, {}))
            if path in own:
                new = kind.merge(layer, path, own[path], spec, change_oi)
            else:
                new = {"weight": layer.weight.double() + oriented(layer, change_oi)}
            for leaf, x in new.items():
                parameter = layer.get_parameter(leaf)
                parameter.copy_(x.to(parameter.dtype))
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


def _patch(layer: Any, part: Mapping[str, Tensor]) -> Tensor:
    """A layer's patch as one float64 matrix; zeros where there is none."""
    if "dense" in part:
        return part["dense"].double()
    if part:
        return part["left"].double() @ part["right"].double()
    return torch.zeros_like(oriented(layer, layer.weight), dtype=torch.float64)


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
    if spec.kind.merge is not None and not is_quantized(model):
        return merge(model, tree, patch, spec=spec)
    wrapped = wrap(model, spec)
    fixed = {f"patch.{name.removeprefix('patch.')}": x for name, x in (patch or {}).items()}
    for name, x in wrapped.tensors({name: x[None] for name, x in tree.items()}, fixed).items():
        path, _, leaf = name.rpartition(".")
        wrapped.model.get_submodule(path).register_buffer(leaf, x.to(model.device), persistent=False)
    return wrapped.model
