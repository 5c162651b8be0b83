"""Bottleneck adapters after every attention and feed-forward block, one a client.

::

    y = h + U_c gelu(D_c h + d_c) + u_c      with h what the sub-layer puts out, before its residual

U and u start at zero, so that a run starts as the frozen model. The sub-layer ends in a linear layer, and
there the adapter sits. PEFT has no such adapter, so there is no folder it could read; norms that the paper
trains as well may be named among the heads, where they are layer norms.

References:
    Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan and Gelly (2019).
    Parameter-Efficient Transfer Learning for NLP. ICML 2019, arXiv:1902.00751.

Legend: C clients, w width of the bottleneck, H width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree
from lichen.models.adapters.heads import client_linear
from lichen.models.adapters.kind import AdapterKind
from lichen.models.adapters.linear_layers import (
    fits,
    frozen_linear,
    is_conv1d,
    is_linear,
    last_blocks,
    oriented,
    target_layers,
)
from lichen.models.adapters.table import BUILT_IN
from lichen.models.packing.packing import Packing

__all__ = ["BOTTLENECK", "Bottleneck"]

SUBLAYER_ENDS = (
    *("o_proj", "out_proj", "attn.c_proj", "attention.output.dense", "attention.dense", "attention.out_lin"),
    *("self_attn.dense", "attn.Wo", "SelfAttention.o"),
    *("down_proj", "mlp.c_proj", "output.dense", "dense_4h_to_h", "fc2", "ffn.lin2", "mlp.Wo", "wo"),
)
"""How transformers' models call the last linear layer of an attention, and of a feed-forward."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """How wide, and where.

    Attributes:
        width: Features of the bottleneck.
        heads: Ends of names of layers trained whole.
        targets: Ends of names of the linear layers that sub-layers end in; empty: those of
            :data:`SUBLAYER_ENDS`.
        last: Only in the last so many layers of the stack; None: in all.

    Raises:
        LichenError: for a width below 1.
    """

    width: int = 16
    heads: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    last: int | None = None

    def __post_init__(self) -> None:
        if self.width < 1:
            raise LichenError(f"width {self.width} is below 1", where="model.adapter.width", fix="use 8, 16 or 64")

    @property
    def kind(self) -> AdapterKind:
        """Small networks in between."""
        return BOTTLENECK


@final
class BottleneckLinear(nn.Module):
    """A frozen linear layer with C small networks after it."""

    buffer_names = ("down_weight", "down_bias", "up_weight", "up_bias")

    def __init__(self, layer: Any, packing: Packing | None = None) -> None:
        super().__init__()
        self.packing = packing or Packing()
        self.weight: nn.Parameter = layer.weight
        self.bias: nn.Parameter | None = layer.bias
        self.transposed = is_conv1d(layer)
        self.out_features, self.in_features = oriented(layer, layer.weight).shape
        for name in self.buffer_names:
            self.register_buffer(name, torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(C*B, ..., in)`` to ``(C*B, ..., H)``."""
        down_CwH, down_Cw, up_CHw, up_CH = (self.get_buffer(name) for name in self.buffer_names)
        h = frozen_linear(self, x, self.bias)
        inner = nn.functional.gelu(client_linear(h, down_CwH, down_Cw, self.packing))
        return h + client_linear(inner, up_CHw, up_CH, self.packing).to(h.dtype)


def place(model: Any, spec: Bottleneck, packing: Packing, heads: Sequence[str]) -> tuple[str, ...]:
    """Put a bottleneck at the end of every sub-layer, and give those layers' names.

    Raises:
        LichenError: if a target fits no layer, or the model's sub-layers are not known.
    """
    if spec.targets:
        layers = target_layers(model, spec.targets, heads, last=spec.last)
    else:
        linear = [name for name, layer in model.named_modules() if is_linear(layer)]
        above = last_blocks(model, spec.last)
        layers = tuple(
            name for name in linear if fits(name, SUBLAYER_ENDS) and name not in heads and name.startswith(above)
        )
    if not layers:
        raise LichenError(
            f"it is not known where the sub-layers of a {type(model).__name__} end",
            where="model.adapter.target_modules",
            fix="name the last linear layers of its attention and its feed-forward",
        )
    for path in layers:
        model.set_submodule(path, BottleneckLinear(model.get_submodule(path), packing))
    return layers


def start(model: Any, path: str, spec: Bottleneck, seed: int) -> Tree:
    """D uniform in ±1/sqrt(H), the rest zero: the frozen layer's own function."""
    layer = model.get_submodule(path)
    like: dict[str, Any] = {
        "dtype": torch.promote_types(layer.weight.dtype, torch.float32),
        "device": layer.weight.device,
    }
    wide = layer.out_features
    uniform = torch.rand(spec.width, wide, generator=torch_generator(seed, "bottleneck", path))
    return {
        "down_weight": ((2 * uniform - 1) / wide**0.5).to(**like),
        "down_bias": torch.zeros(spec.width, **like),
        "up_weight": torch.zeros(wide, spec.width, **like),
        "up_bias": torch.zeros(wide, **like),
    }


def build(section: Any, heads: tuple[str, ...]) -> Bottleneck:
    """From a recipe's section."""
    return Bottleneck(width=section.width, heads=heads, last=section.last)


BOTTLENECK = AdapterKind(
    facts=BUILT_IN["bottleneck"], build=build, place=place, start=start, tensors=BottleneckLinear.buffer_names
)
