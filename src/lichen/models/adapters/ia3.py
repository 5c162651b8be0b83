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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.models.adapters.lora import choose, frozen_linear, is_conv1d, oriented
from lichen.models.packing.packing import Packing

__all__ = ["IA3", "IA3Linear", "place", "start"]


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
                "no layer is named", where="model.adapter.targets", fix="name the keys, the values and the feed-forward"
            )


@final
class IA3Linear(nn.Module):
    """A frozen linear layer with C vectors on its output or its input."""

    places = ("ia3_l",)

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
            x = (x * self.packing.beside(l_CF, x)).to(x.dtype)
        y = frozen_linear(self, x, self.bias)
        return y if self.inputs else (y * self.packing.beside(l_CF, y)).to(y.dtype)


def place(model: Any, spec: IA3, packing: Packing, heads: Sequence[str]) -> tuple[str, ...]:
    """Put vectors on the layers that ``spec`` names, and give those layers' names.

    Raises:
        LichenError: if a name fits no layer.
    """
    inputs = choose(model, spec.feedforward, heads, last=spec.last, where="model.adapter.feedforward")
    outputs = choose(model, spec.targets, heads, last=spec.last)
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
