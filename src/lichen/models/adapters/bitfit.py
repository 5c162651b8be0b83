"""BitFit: trains the biases of linear layers and layer norms, one copy a client.

A bias costs as many numbers as its layer is wide, and moves a model like BERT nearly as far as training
it whole. Models without biases, Llama among them, have nothing to train this way.

References:
    Ben Zaken, Goldberg and Ravfogel (2022). BitFit: Simple Parameter-efficient Fine-tuning for
    Transformer-based Masked Language-models. ACL 2022, arXiv:2106.10199.

Legend: C clients, o out, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.models.adapters.kind import AdapterKind
from lichen.models.adapters.linear_layers import frozen_linear, is_conv1d, is_linear, last_blocks, oriented
from lichen.models.adapters.table import BUILT_IN
from lichen.models.packing.packing import Packing

__all__ = ["BIASES", "BitFit"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BitFit:
    """All biases.

    Attributes:
        heads: Ends of names of layers trained whole.
        last: Only in the last so many layers of the stack; None: everywhere.
    """

    heads: tuple[str, ...] = ()
    last: int | None = None

    @property
    def kind(self) -> AdapterKind:
        """The biases."""
        return BIASES


@final
class BiasLinear(nn.Module):
    """A linear layer with a frozen weight and biases (C, out)."""

    buffer_names = ("bias",)

    def __init__(self, layer: Any, packing: Packing | None = None) -> None:
        super().__init__()
        self.packing = packing or Packing()
        self.weight: nn.Parameter = layer.weight
        self.transposed = is_conv1d(layer)
        self.out_features, self.in_features = oriented(layer, layer.weight).shape
        self.first: dict[str, Tensor] = {"bias": layer.bias}
        self.register_buffer("bias", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(C*B, ..., in)`` to ``(C*B, ..., out)``."""
        y = frozen_linear(self, x)
        return (y + self.packing.at_rows(self.get_buffer("bias"), y)).to(y.dtype)


@final
class BiasNorm(nn.Module):
    """``nn.LayerNorm`` over the last axis with a frozen weight and biases (C, H)."""

    buffer_names = ("bias",)

    def __init__(self, layer: nn.LayerNorm, packing: Packing | None = None) -> None:
        super().__init__()
        self.packing = packing or Packing()
        self.weight: nn.Parameter = layer.weight
        self.shape, self.eps = layer.normalized_shape, layer.eps
        self.first: dict[str, Tensor] = {"bias": layer.bias}
        self.register_buffer("bias", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(C*B, ..., H)``, normalised over the last axis."""
        y = nn.functional.layer_norm(x, self.shape, self.weight, eps=self.eps)
        return (y + self.packing.at_rows(self.get_buffer("bias"), y)).to(y.dtype)


def _has_bias(layer: Any) -> bool:
    known = is_linear(layer) or (isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1)
    return known and layer.bias is not None


def place(model: Any, spec: BitFit, packing: Packing, heads: Sequence[str]) -> tuple[str, ...]:
    """Make room for every bias outside the heads, and give those layers' names.

    Raises:
        LichenError: if the model has no bias.
    """
    above = last_blocks(model, spec.last)
    layers = tuple(
        name
        for name, layer in model.named_modules()
        if _has_bias(layer) and name not in heads and name.startswith(above)
    )
    if not layers:
        raise LichenError(
            f"{type(model).__name__} has no biases to train",
            where="model.adapter",
            fix="use lora or ia3 with this model",
        )
    for path in layers:
        layer = model.get_submodule(path)
        wrapped = BiasNorm(layer, packing) if isinstance(layer, nn.LayerNorm) else BiasLinear(layer, packing)
        model.set_submodule(path, wrapped)
    return layers


def start(model: Any, path: str, spec: BitFit, seed: int) -> Tree:
    """As the model has them; nothing is drawn."""
    bias_o = model.get_submodule(path).first["bias"]
    return {"bias": bias_o.detach().to(torch.promote_types(bias_o.dtype, torch.float32), copy=True)}


def merge(layer: Any, path: str, own: Tree, spec: BitFit, change_oi: Tensor) -> Tree:
    """Biases are weights of the model, by name, and come in with the layers trained whole."""
    return {}


def build(section: Any, heads: tuple[str, ...]) -> BitFit:
    """From a recipe's section."""
    return BitFit(heads=heads, last=section.last)


BIASES = AdapterKind(facts=BUILT_IN["bitfit"], build=build, place=place, start=start, merge=merge)
