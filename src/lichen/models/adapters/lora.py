"""LoRA with a leading client axis beside one frozen linear layer.

::

    y = x (W + patch)' + s (x A_c') B_c'      for the rows of client c

with ``s = alpha / r``, or ``alpha / sqrt(r)``, which keeps the size of what is learned the same at
every rank. A layer whose adapter is absent from a call runs its frozen weight and its patch alone.

Two adapters side by side are one of the sum of their ranks: A under A, B beside B. What each of them counts, ``w``, may
differ by row (:attr:`lichen.models.packing.packing.Packing.second_CB`), or by token and layer, as a gate ``G`` has it::

    y = x W' + s ((x A_c') * w) B_c'      w = softmax(x G_c'), a number for each half of the ranks

References:
    Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang and Chen (2022). LoRA: Low-Rank Adaptation of Large
    Language Models. ICLR 2022, arXiv:2106.09685.
    Kalajdzievski (2023). A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA.
    arXiv:2312.03732.
    Bian, Wang, Zhang and Xu (2026). FedALT: Federated Fine-Tuning Through Adaptive Local Training with
    Rest-of-World LoRA. AAAI 2026, arXiv:2503.11880. (the gate)

Legend: C clients, N rows of one client (B or B*T), r rank, i in, o out, R rank of a factored patch, w two halves.
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
from lichen.models.adapters.kind import AdapterKind
from lichen.models.adapters.linear_layers import frozen_linear, frozen_weight, is_conv1d, oriented, target_layers
from lichen.models.adapters.lora_peft import LORA_PEFT
from lichen.models.adapters.quantized import linear_frozen
from lichen.models.adapters.table import BUILT_IN
from lichen.models.packing.grouped import packed_adapter, packed_linear
from lichen.models.packing.packing import Packing

__all__ = ["LORA", "Lora", "LoraLinear"]


@final
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

    @property
    def kind(self) -> AdapterKind:
        """Low-rank adapters."""
        return LORA


@final
class LoraLinear(nn.Module):
    """A frozen linear layer with C low-rank adapters and a patch, which come in through ``functional_call``.

    Rows are the clients' in equal numbers, or packed as ``packing`` says. Adapters may have any rank; empty
    ones are no adapters.
    """

    buffer_names = ("lora_A", "lora_B")
    gate_name = "lora_gate"

    def __init__(self, layer: Any, *, scale: float, packing: Packing | None = None) -> None:
        super().__init__()
        self.packing = packing or Packing()
        self.weight: nn.Parameter = layer.weight
        self.bias: nn.Parameter | None = layer.bias
        self.transposed = is_conv1d(layer)
        self.scale = scale
        self.out_features, self.in_features = oriented(layer, layer.weight).shape
        for name in (*self.buffer_names, self.gate_name, "patch_dense", "patch_left", "patch_right"):
            self.register_buffer(name, torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(C*B, ..., in)`` to ``(C*B, ..., out)``."""
        A_Cri, B_Cor = self.packing.own(self.get_buffer("lora_A")), self.packing.own(self.get_buffer("lora_B"))
        dense, left_oR, right_Ri = (self.get_buffer(f"patch_{name}") for name in ("dense", "left", "right"))

        def weight() -> Tensor:
            weight_oi = frozen_weight(self)
            return weight_oi + dense.to(weight_oi.dtype) if dense.numel() else weight_oi

        pack, gate_Cwi = self.packing.current, self.packing.own(self.get_buffer(self.gate_name))
        weighed = bool(gate_Cwi.numel()) or self.packing.second_CB is not None
        if pack is None:
            y = linear_frozen(x, weight, self.bias) if dense.numel() else frozen_linear(self, x, self.bias)
        else:
            x_Ni, A, B = x.reshape(-1, self.in_features), A_Cri, B_Cor
            if weighed:
                A, B = A[:0], B[:0]
            y = packed_adapter(x_Ni, weight, self.bias, A, B, scale=self.scale, pack=pack)
            y = y.reshape(*x.shape[:-1], self.out_features)
        if left_oR.numel() and not dense.numel():
            y = y + nn.functional.linear(nn.functional.linear(x.to(right_Ri.dtype), right_Ri), left_oR).to(y.dtype)
        if not A_Cri.numel() or (pack is not None and not weighed):
            return y
        return y + self._low(x, A_Cri, B_Cor, gate_Cwi, weighed=weighed).reshape(y.shape).to(y.dtype)

    def _low(self, x: Tensor, A_Cri: Tensor, B_Cor: Tensor, gate_Cwi: Tensor, *, weighed: bool) -> Tensor:
        """What the adapters add, ``(C, N, out)`` or of packed tokens ``(N, out)``; in the adapters' dtype."""
        pack = self.packing.current
        if pack is None:
            x = x.reshape(A_Cri.shape[0], -1, self.in_features).to(A_Cri.dtype)
        else:
            x = x.reshape(-1, self.in_features).to(A_Cri.dtype)

        def times(x: Tensor, matrix_Coi: Tensor) -> Tensor:
            if pack is None:
                return torch.bmm(x, matrix_Coi.transpose(1, 2))
            return packed_linear(x, matrix_Coi, pack)

        low = times(x, A_Cri)
        if weighed:
            if gate_Cwi.numel():
                each = times(x, gate_Cwi.to(x.dtype)).softmax(-1)
            else:
                second_CB = self.packing.second_CB
                assert second_CB is not None
                second = self.packing.at_tokens(second_CB, x.shape[-2]).to(low.dtype)
                each = torch.stack([1 - second, second], -1)
            low = low * each.repeat_interleave(low.shape[-1] // 2, dim=-1)
        return times(low, B_Cor) * self.scale


def place(model: Any, spec: Lora, packing: Packing, heads: Sequence[str]) -> tuple[str, ...]:
    """Put adapters on the layers that ``spec`` names, and give those layers' names.

    Raises:
        LichenError: if a target fits no layer.
    """
    layers = target_layers(model, spec.targets, heads, last=spec.last)
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


def merge(layer: Any, path: str, own: Tree, spec: Lora, change_oi: Tensor) -> Tree:
    """``s B A``, and the patch, into the weight."""
    change_oi = change_oi + spec.scale * (own["lora_B"].double() @ own["lora_A"].double())
    return {"weight": layer.weight.double() + oriented(layer, change_oi)}


def build(section: Any, heads: tuple[str, ...]) -> Lora:
    """From a recipe's section."""
    return Lora(
        targets=section.target_modules,
        rank=section.rank,
        alpha=section.alpha,
        rslora=section.rslora,
        heads=heads,
        last=section.last,
    )


LORA = AdapterKind(
    facts=BUILT_IN["lora"],
    build=build,
    place=place,
    start=start,
    tensors=LoraLinear.buffer_names,
    optional=(LoraLinear.gate_name,),
    patched=True,
    merge=merge,
    peft=LORA_PEFT,
)
