"""Wraps a frozen model with an adapter of any kind, with a leading client axis.

``wrap`` gives a new module structure around the SAME weight tensors: the caller's model stays as it
was. Trainable tensors and patches then enter each call through ``torch.func.functional_call``. What
sets a kind of adapter apart is its own object's to do (:mod:`lichen.models.adapters.kind`).

Legend: C clients.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor
from torch.func import functional_call

from lichen.core.errors import LichenError
from lichen.core.tree import Tree, split
from lichen.models.adapters.ends.end_blocks import patched_middle, refuse_middle
from lichen.models.adapters.heads import is_client_layer, wrap_layer
from lichen.models.adapters.kind import Spec
from lichen.models.adapters.linear_layers import fits, is_linear, refuse_unknown
from lichen.models.adapters.lora import LoraLinear
from lichen.models.adapters.quantized import QuantizedLinear
from lichen.models.packing.packing import Packing
from lichen.models.packing.position_table import part_position_tables

__all__ = ["Wrapped", "wrap"]


@final
@dataclass(frozen=True, slots=True)
class Wrapped:
    """A frozen model with places for C clients' tensors.

    Attributes:
        model: The new structure around the same weights.
        layers: Names of the layers with an adapter.
        heads: Names of the layers trained whole.
        spec: What was asked for.
        packing: What its layers look at to know whether rows are packed.
        checkpointing: In calls of this one, layers keep their input only and compute the rest again on the way back.
        patch_only: Names of layers that have no adapter, and take a patch of their frozen weight.
    """

    model: Any
    layers: tuple[str, ...]
    heads: tuple[str, ...]
    spec: Spec
    packing: Packing
    checkpointing: bool = False
    patch_only: tuple[str, ...] = ()

    def init(self, seed: int) -> Tree:
        """Start values without client axis: the adapter's as its kind has them, heads as the model has them."""
        start = self.spec.kind.start
        tree: Tree = {}
        for path in self.layers:
            tree |= {f"{path}.{name}": x for name, x in start(self.model, path, self.spec, seed).items()}
        return tree | self.heads_as_loaded()

    def heads_as_loaded(self) -> Tree:
        """Start values of the layers trained whole, without client axis: what the model has there."""
        return {
            f"{path}.{name}": x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)
            for path in self.heads
            for name, x in self.model.get_submodule(path).start.items()
        }

    def frozen(self) -> Tree:
        """The weights no client trains, each once."""
        trained = {f"{path}.{name}" for path in self.heads for name in self.model.get_submodule(path).start}
        persistent = self.model.state_dict(keep_vars=True).keys()
        every = chain(self.model.named_parameters(), self.model.named_buffers())
        return {name: x for name, x in every if name in persistent and name not in trained}

    def tensors(self, trainable_C: Tree, fixed: Tree) -> Tree:
        """What ``functional_call`` puts in: the clients' tensors, and the patch on its layers.

        A layer that takes a patch may lack all its own tensors: it then runs its frozen weight and its patch.

        Raises:
            LichenError: for a missing or unknown trainable tensor, or a patch on a layer without adapter.
        """
        names: set[str] = set()
        patched = self.spec.kind.patched
        for path in self.layers:
            own = {f"{path}.{name}" for name in self.model.get_submodule(path).buffer_names}
            if not patched or own & trainable_C.keys():
                names |= own
        names |= {f"{path}.{name}" for path in self.heads for name in self.model.get_submodule(path).start}
        names |= {f"{path}.{name}" for path in self.layers for name in self.spec.kind.optional} & trainable_C.keys()
        if trainable_C.keys() != names:
            odd = sorted(trainable_C.keys() ^ names)[0]
            state = "is missing" if odd in names else "belongs to no layer of this model"
            raise LichenError(
                f"trainable tensor {odd!r} {state}", where="model.adapter", fix="use the run's own adapter"
            )
        ready = dict(trainable_C)
        for name, x in split(fixed, "patch.")[0].items():
            path, _, kind = name.rpartition(".")
            known = patched and (path in self.layers or path in self.patch_only)
            if not known or kind not in ("dense", "left", "right"):
                raise LichenError(f"the patch {name!r} fits no layer with an adapter", where="job")
            ready[f"{path}.patch_{kind}"] = x
        return ready

    def call(self, trainable_C: Tree, fixed: Tree, /, *, part: str = "", **inputs: Any) -> Any:
        """The model's output, or that of the submodule ``part``, for C clients' rows stacked on the first axis."""
        ready = self.tensors(trainable_C, fixed)
        self.packing.clients = next((len(x_C) for x_C in trainable_C.values()), 1)
        self.packing.checkpointing = self.checkpointing
        module = self.model.get_submodule(part)
        inside = split(ready, f"{part}.")[0] if part else ready
        # Not tied: a head trained whole must leave the embedding it was tied to alone.
        return functional_call(module, inside, kwargs=inputs, tie_weights=False)


def wrap(model: Any, spec: Spec, *, bare: bool = False) -> Wrapped:
    """Put adapters and heads on chosen layers of a frozen model, which itself stays untouched.

    Args:
        model: A transformers model.
        spec: What is trained.
        bare: That may be nothing, as in a piece of a model.

    Raises:
        LichenError: if a name in ``spec`` fits no layer, or nothing would be trained.
    """
    modules = dict(model.named_modules())
    refuse_unknown(spec.heads, [name for name in modules if name], where="model.adapter.modules_to_save")
    under = [name for name in modules if name and fits(name, spec.heads)]
    refuse_middle(model, under, where="model.adapter.modules_to_save")
    heads: list[str] = []
    for name, layer in modules.items():
        if not any(name == head or name.startswith(f"{head}.") for head in under):
            continue
        if isinstance(layer, QuantizedLinear):
            raise LichenError(f"{name} is quantised and cannot be trained whole", where="model.adapter.modules_to_save")
        if is_client_layer(layer):
            heads.append(name)
        elif any(True for _ in layer.parameters(recurse=False)):
            raise LichenError(
                f"{name} is a {type(layer).__name__}, which cannot be trained whole",
                where="model.adapter.modules_to_save",
                fix="name linear layers, layer norms or embeddings",
            )
    shared: dict[int, Any] = {id(x): x for x in _tensors(model)}
    twin, packing = copy.deepcopy(model, shared), Packing()
    layers = spec.kind.place(twin, spec, packing, tuple(heads))
    middle = patched_middle(model)
    patch_only = tuple(
        name for name, layer in modules.items() if middle and name.startswith(middle) and is_linear(layer)
    )
    for path in patch_only:
        twin.set_submodule(path, LoraLinear(twin.get_submodule(path), scale=1.0, packing=packing))
    if not layers and not heads and not bare:
        raise LichenError("nothing would be trained", where="model.adapter", fix="name targets or heads")
    for path in heads:
        twin.set_submodule(path, wrap_layer(twin.get_submodule(path), packing))
    part_position_tables(twin, {*layers, *heads}, packing)
    return Wrapped(twin.eval(), layers, tuple(heads), spec, packing, patch_only=patch_only)


def _tensors(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
