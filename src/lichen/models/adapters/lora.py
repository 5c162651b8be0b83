"""LoRA with a leading client axis beside one frozen linear layer.

::

    y = x (W + patch)' + s (x A_c') B_c'      for the rows of client c

with ``s = alpha / r``, or ``alpha / sqrt(r)``, which keeps the size of what is learned the same at
every rank. A layer whose adapter is absent from a call runs its frozen weight and its patch alone.

References:
    Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang and Chen (2022). LoRA: Low-Rank Adaptation of Large
    Language Models. ICLR 2022, arXiv:2106.09685.
    Kalajdzievski (2023). A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA.
    arXiv:2312.03732.

Legend: C clients, N rows of one client (B or B*T), r rank, i in, o out, R rank of a factored patch.
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
from lichen.models.adapters.quantized import QuantizedLinear, QuantizedWeight, dense_weight, linear_frozen
from lichen.models.packing.grouped import packed_adapter
from lichen.models.packing.packing import Packing

__all__ = [
    "Lora",
    "LoraLinear",
    "all_linear",
    "choose",
    "fits",
    "frozen_linear",
    "frozen_weight",
    "is_conv1d",
    "is_linear",
    "last_blocks",
    "oriented",
    "place",
    "refuse_unknown",
    "start",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """What of a model is trained.

    Attributes:
        targets: Ends of layer names as in PEFT (``q_proj`` fits ``model.layers.0.self_attn.q_proj``),
            or ``"all-linear"``: every linear layer but the output layer. Empty: no adapter.
        rank: Rank r.
        alpha: The adapter is scaled by ``alpha / rank``.
        heads: Ends of names of layers trained whole (PEFT's ``modules_to_save``).
        last: Adapters only in the last so many layers of the stack; None: in all.
        rslora: Scale by ``alpha / sqrt(rank)`` instead.

    Raises:
        LichenError: for a rank below 1 or an alpha that is not positive.
    """

    targets: tuple[str, ...] | str
    rank: int = 8
    alpha: float = 16.0
    heads: tuple[str, ...] = ()
    last: int | None = None
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise LichenError(f"rank {self.rank} is below 1", where="model.adapter.rank", fix="use 4, 8 or 16")
        if not self.alpha > 0:
            raise LichenError(
                f"alpha {self.alpha} is not positive", where="model.adapter.alpha", fix="use twice the rank"
            )

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by, whatever the rank of the tensors at hand.

        >>> Lora(targets=("q_proj",), rank=16, alpha=16.0).scale
        1.0
        >>> Lora(targets=("q_proj",), rank=16, alpha=16.0, rslora=True).scale
        4.0
        """
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight lies the other way."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def is_linear(layer: nn.Module) -> bool:
    """Whether an adapter fits: ``nn.Linear``, quantised or not, or the transposed ``Conv1D`` of GPT-2."""
    return isinstance(layer, (nn.Linear, QuantizedLinear)) or is_conv1d(layer)


def oriented(layer: nn.Module, matrix_oi: Tensor) -> Tensor:
    """An (out, in) matrix as the layer's own weight lies."""
    return matrix_oi.t() if is_conv1d(layer) else matrix_oi


def frozen_weight(layer: Any) -> Tensor:
    """The (out, in) matrix of a wrapped layer that no client trains; made anew where it is quantised."""
    weight = dense_weight(layer.weight)
    return weight.t() if layer.transposed else weight


def frozen_linear(layer: Any, x: Tensor, bias_o: Tensor | None = None) -> Tensor:
    """``x W' + b`` of a wrapped layer's frozen part; a quantised weight is not kept dense for the way back."""
    if isinstance(layer.weight, QuantizedWeight):
        return linear_frozen(x, layer.weight.dense, bias_o)
    return nn.functional.linear(x, frozen_weight(layer), bias_o)


@final
class LoraLinear(nn.Module):
    """A frozen linear layer with C low-rank adapters and a patch, which come in through ``functional_call``.

    Rows are the clients' in equal numbers, or packed as ``packing`` says. Adapters may have any rank; empty
    ones are no adapters.
    """

    places = ("lora_A", "lora_B")

    def __init__(self, layer: Any, *, scale: float, packing: Packing | None = None) -> None:
        super().__init__()
        self.packing = packing or Packing()
        self.weight: nn.Parameter = layer.weight
        self.bias: nn.Parameter | None = layer.bias
        self.transposed = is_conv1d(layer)
        self.scale = scale
        self.out_features, self.in_features = oriented(layer, layer.weight).shape
        for name in ("lora_A", "lora_B", "patch_dense", "patch_left", "patch_right"):
            self.register_buffer(name, torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(C*B, ..., in)`` to ``(C*B, ..., out)``."""
        A_Cri, B_Cor = self.packing.own(self.get_buffer("lora_A")), self.packing.own(self.get_buffer("lora_B"))
        dense, left_oR, right_Ri = (self.get_buffer(f"patch_{name}") for name in ("dense", "left", "right"))

        def weight() -> Tensor:
            weight_oi = frozen_weight(self)
            return weight_oi + dense.to(weight_oi.dtype) if dense.numel() else weight_oi

        pack = self.packing.current
        if pack is None:
            y = linear_frozen(x, weight, self.bias) if dense.numel() else frozen_linear(self, x, self.bias)
        else:
            x_Ni = x.reshape(-1, self.in_features)
            y = packed_adapter(x_Ni, weight, self.bias, A_Cri, B_Cor, scale=self.scale, pack=pack)
            y = y.reshape(*x.shape[:-1], self.out_features)
        if left_oR.numel() and not dense.numel():
            y = y + nn.functional.linear(nn.functional.linear(x.to(right_Ri.dtype), right_Ri), left_oR).to(y.dtype)
        if pack is not None or not A_Cri.numel():
            return y
        x_CNi = x.reshape(A_Cri.shape[0], -1, self.in_features).to(A_Cri.dtype)
        low_CNo = torch.bmm(torch.bmm(x_CNi, A_Cri.transpose(1, 2)), B_Cor.transpose(1, 2)) * self.scale
        return y + low_CNo.reshape(y.shape).to(y.dtype)


def all_linear(model: Any) -> tuple[str, ...]:
    """Every linear layer but the output layer and a classification head, as PEFT's ``all-linear``."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return tuple(
        name
        for name, layer in model.named_modules()
        if is_linear(layer) and layer is not output and name.split(".")[0] not in ("score", "classifier")
    )


def fits(name: str, ends: Sequence[str]) -> bool:
    """Whether a layer's name ends in one of these, at a dot.

    >>> fits("layers.0.mlp.up_proj", ("up_proj",)), fits("layers.0.mlp.up_proj", ("proj",))
    (True, False)
    """
    return any(name == end or name.endswith(f".{end}") for end in ends)


def refuse_unknown(ends: Sequence[str], found: Sequence[str], *, where: str) -> None:
    """Say so if one of ``ends`` fits none of the names found.

    Raises:
        LichenError: naming it, and what there is.
    """
    for end in ends:
        if not any(fits(name, (end,)) for name in found):
            known = sorted({name.rpartition(".")[2] for name in found})
            raise LichenError(f"no layer is called {end!r}", where=where, fix=f"use some of: {', '.join(known)}")


def last_blocks(model: Any, last: int | None) -> str | tuple[str, ...]:
    """How names in the last blocks of the model's stack begin; the empty beginning of all names for None.

    Raises:
        LichenError: if the model has no such stack, or fewer blocks.
    """
    if last is None:
        return ""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [name for name, layer in model.named_modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not 1 <= last <= len(blocks):
        raise LichenError(f"the model has {len(blocks)} layers", where="model.adapter.last", fix="name as many at most")
    return tuple(f"{name}." for name in blocks[-last:])


def choose(
    model: Any, targets: Sequence[str] | str, heads: Sequence[str], *, last: int | None, where: str = "adapter.targets"
) -> tuple[str, ...]:
    """The linear layers that ``targets`` mean, in the model's order, heads left out.

    Args:
        model: Untouched yet.
        targets: Ends of names, or ``"all-linear"``.
        heads: Full names of layers trained whole.
        last: Only in the last so many layers of the stack; None: in all.
        where: The key that errors name.

    Raises:
        LichenError: if an end fits no linear layer.
    """
    if isinstance(targets, str):
        if targets != "all-linear":
            raise LichenError(f"{targets!r} is no list", where=where, fix="a list, or all-linear")
        chosen = all_linear(model)
    else:
        linear = [name for name, layer in model.named_modules() if is_linear(layer)]
        refuse_unknown(targets, linear, where=where)
        chosen = tuple(name for name in linear if fits(name, targets))
    above = last_blocks(model, last)
    return tuple(name for name in chosen if name not in heads and name.startswith(above))


def place(model: Any, spec: Lora, packing: Packing, heads: Sequence[str]) -> tuple[str, ...]:
    """Put adapters on the layers that ``spec`` names, and give those layers' names.

    Raises:
        LichenError: if a target fits no layer.
    """
    layers = choose(model, spec.targets, heads, last=spec.last)
    for path in layers:
        model.set_submodule(path, LoraLinear(model.get_submodule(path), scale=spec.scale, packing=packing))
    return layers


def start(model: Any, path: str, spec: Lora, seed: int) -> Tree:
    """A uniform in ±1/sqrt(in), B zero: the frozen layer's own function."""
    layer = model.get_submodule(path)
    dtype, device = torch.promote_types(layer.weight.dtype, torch.float32), layer.weight.device
    uniform = torch.rand(spec.rank, layer.in_features, generator=torch_generator(seed, "lora_A", path))
    A_ri = ((2 * uniform - 1) / layer.in_features**0.5).to(dtype)
    return {
        "lora_A": A_ri.to(device),
        "lora_B": torch.zeros(layer.out_features, spec.rank, dtype=dtype, device=device),
    }
