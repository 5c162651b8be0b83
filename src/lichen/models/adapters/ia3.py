"""IA3: learned vectors that scale keys, values and feed-forward activations, one set a client.

::

    y = (x W' + b) * l_c          a target layer, such as keys and values
    y = (x * l_c) W' + b          a feed-forward layer, whose input is what the paper scales

Vectors start at one, so that a run starts as the frozen model. A layer costs as many numbers as it is
wide: about a hundredth of a low-rank adapter's.

References:
    Liu, Tam, Muqeeth, Mohta, Huang, Bansal and Raffel (2022). Few-Shot Parameter-Efficient Fine-Tuning
    is Better and Cheaper than In-Context Learning. NeurIPS 2022, arXiv:2205.05638.

Legend: C clients, F features in or out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.models.adapters.kind import BEFORE_LAYERS, AdapterKind, PeftFormat, PeftTensors
from lichen.models.adapters.linear_layers import fits, frozen_linear, is_conv1d, oriented, target_layers
from lichen.models.adapters.table import BUILT_IN
from lichen.models.packing.packing import Packing

__all__ = ["IA3", "LEARNED_SCALES"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class IA3:
    """Which layers are scaled.

    Attributes:
        targets: Ends of names of the linear layers whose output is scaled.
        feedforward: Ends of names of those whose input is scaled; they win where both fit.
        heads: Ends of names of layers trained whole (PEFT's ``modules_to_save``).
        last: Only in the last so many layers of the stack; None: in all.

    Raises:
        LichenError: if neither kind of layer is named.
    """

    targets: tuple[str, ...] = ()
    feedforward: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    last: int | None = None

    def __post_init__(self) -> None:
        if not self.targets and not self.feedforward:
            raise LichenError(
                "no layer is named",
                where="model.adapter.target_modules",
                fix="name the keys, the values and the feed-forward",
            )

    @property
    def kind(self) -> AdapterKind:
        """Learned scales."""
        return LEARNED_SCALES


@final
class IA3Linear(nn.Module):
    """A frozen linear layer with C vectors on its output or its input."""

    buffer_names = ("ia3_l",)

    def __init__(self, layer: Any, *, inputs: bool, packing: Packing | None = None) -> None:
        super().__init__()
        self.packing = packing or Packing()
        self.weight: nn.Parameter = layer.weight
        self.bias: nn.Parameter | None = layer.bias
        self.transposed, self.inputs = is_conv1d(layer), inputs
        self.out_features, self.in_features = oriented(layer, layer.weight).shape
        self.register_buffer("ia3_l", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(C*B, ..., in)`` to ``(C*B, ..., out)``."""
        l_CF = self.get_buffer("ia3_l")
        if self.inputs:
            x = (x * self.packing.at_rows(l_CF, x)).to(x.dtype)
        y = frozen_linear(self, x, self.bias)
        return y if self.inputs else (y * self.packing.at_rows(l_CF, y)).to(y.dtype)


def place(model: Any, spec: IA3, packing: Packing, heads: Sequence[str]) -> tuple[str, ...]:
    """Put vectors on the layers that ``spec`` names, and give those layers' names.

    Raises:
        LichenError: if a name fits no layer.
    """
    inputs = target_layers(model, spec.feedforward, heads, last=spec.last, where="model.adapter.feedforward_modules")
    outputs = target_layers(model, spec.targets, heads, last=spec.last)
    layers = tuple(name for name, _ in model.named_modules() if name in {*inputs, *outputs})
    for path in layers:
        model.set_submodule(path, IA3Linear(model.get_submodule(path), inputs=path in inputs, packing=packing))
    return layers


def start(model: Any, path: str, spec: IA3, seed: int) -> Tree:
    """Ones: the frozen layer's own function; nothing is drawn."""
    layer = model.get_submodule(path)
    width = layer.in_features if layer.inputs else layer.out_features
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    return {"ia3_l": torch.ones(width, dtype=dtype, device=layer.weight.device)}


def merge(layer: Any, path: str, own: Tree, spec: IA3, change_oi: Tensor) -> Tree:
    """The vector into rows and bias of a layer whose output it scales, or into columns."""
    l_F, weight = own["ia3_l"].double(), layer.weight.double()
    if fits(path, spec.feedforward):
        return {"weight": weight * oriented(layer, l_F[None])}
    bias = {} if layer.bias is None else {"bias": layer.bias.double() * l_F}
    return {"weight": weight * oriented(layer, l_F[:, None]), **bias}


def build(section: Any, heads: tuple[str, ...]) -> IA3:
    """From a recipe's section.

    Raises:
        LichenError: if all linear layers are asked for where they must be named.
    """
    if isinstance(section.target_modules, str):
        raise LichenError("ia3 scales named layers", where="model.adapter.target_modules", fix="list them")
    return IA3(targets=section.target_modules, feedforward=section.feedforward_modules, heads=heads, last=section.last)


def write(tree: Tree, spec: IA3, patches: Mapping[str, Mapping[str, Tensor]]) -> PeftTensors:
    """Vectors as PEFT lays them: a row where it scales inputs, a column where it scales outputs.

    Raises:
        LichenError: if there is none.
    """
    own = frozenset(name for name in tree if name.endswith(".ia3_l"))
    if not own:
        raise LichenError("there is no IA3 vector to write", where="export", fix="name targets")
    layers = sorted(name.removesuffix(".ia3_l") for name in own)
    inputs = [path for path in layers if fits(path, spec.feedforward)]
    tensors = {
        f"{BEFORE_LAYERS}{path}.ia3_l": tree[f"{path}.ia3_l"].view((1, -1) if path in inputs else (-1, 1))
        for path in layers
    }
    return PeftTensors(own=own, tensors=tensors, fields={"target_modules": layers, "feedforward_modules": inputs})


def _scales_inputs(path: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT scales what this layer reads."""
    feedforward = config.get("feedforward_modules") or ()
    if isinstance(feedforward, str):
        return re.fullmatch(feedforward, path) is not None
    return path.endswith(tuple(feedforward))


def read(tensors: Tree, config: Mapping[str, Any], names: Iterable[str], where: str) -> Tree:
    """The vectors, flat.

    Raises:
        LichenError: if one is not laid as its configuration says.
    """
    tree: Tree = {}
    for name, x in tensors.items():
        path = name.removesuffix(".ia3_l")
        if path != name and (x.dim() != 2 or x.shape[0 if _scales_inputs(path, config) else 1] != 1):
            raise LichenError(
                f"the vector of {path!r} has shape {tuple(x.shape)}, which its feedforward_modules do not fit",
                where=where,
                fix="mend them there",
            )
        tree[name] = x if path == name else x.flatten()
    return tree


def begin(tree: Tree, fresh: Tree, spec: IA3, config: Mapping[str, Any], where: str) -> tuple[Tree, list[str]]:
    """The vectors of the run's layers; those that the adapter leaves alone are ones.

    Raises:
        LichenError: naming the key of the recipe that would make it fit.
    """
    found: Tree = {}
    for name in fresh:
        path = name.removesuffix(".ia3_l")
        if name not in tree:
            found[name] = fresh[name]
            continue
        inputs, theirs = fits(path, spec.feedforward), _scales_inputs(path, config)
        if inputs != theirs:
            side, fix = ("input", f"add {path.rpartition('.')[2]}") if theirs else ("output", "leave it out there")
            raise LichenError(
                f"the adapter in {where} scales the {side} of {path!r}",
                where="model.adapter.feedforward_modules",
                fix=fix,
            )
        if tree[name].numel() != fresh[name].numel():
            raise LichenError(
                f"layer {path!r} has {tree[name].numel()} numbers in the adapter and {fresh[name].numel()} in the base",
                where=where,
                fix="name the base that the adapter was made for",
            )
        found[name] = tree[name]
    alone = len(fresh.keys() - tree.keys())
    return found, [f"{alone} of the run's layers are not in the adapter; they start as the base"] if alone else []


LEARNED_SCALES = AdapterKind(
    facts=BUILT_IN["ia3"],
    build=build,
    place=place,
    start=start,
    tensors=IA3Linear.buffer_names,
    merge=merge,
    peft=PeftFormat(
        type="IA3",
        config="IA3Config",
        write=write,
        read=read,
        begin=begin,
        honoured=frozenset({"target_modules", "exclude_modules", "feedforward_modules"}),
        idle=frozenset({"fan_in_fan_out", "init_ia3_weights"}),
        initial="init_ia3_weights",
        key_of=lambda path, config: "feedforward_modules" if _scales_inputs(path, config) else "target_modules",
    ),
)
