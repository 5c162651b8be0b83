"""Fully trained layers, one copy a client: linear heads, layer norms, embeddings.

Their tensors come in through ``torch.func.functional_call`` as ``weight`` and ``bias`` with a
leading client axis; the frozen model's own values are only where clients start from. Rows are the
clients' in equal numbers, or packed.

Legend: C clients, N rows of one client, i in, o out, V vocabulary, H width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor, nn

from lichen.core.errors import LichenError
from lichen.models.adapters.linear_layers import is_conv1d, oriented
from lichen.models.packing.grouped import packed_linear
from lichen.models.packing.packing import Packing

__all__ = ["ClientEmbedding", "ClientLinear", "ClientNorm", "client_linear", "is_client_layer", "wrap_layer"]


def _register(module: Any, layer: Any) -> dict[str, Tensor]:
    """Make room for the clients' tensors, and give the values to start from."""
    start: dict[str, Tensor] = dict(layer.named_parameters(recurse=False))
    for name in ("weight", "bias"):
        module.register_buffer(name, torch.empty(0), persistent=False)
    return start


def client_linear(x: Tensor, weight_Coi: Tensor, bias_Co: Tensor, packing: Packing) -> Tensor:
    """``(C*B, ..., in)`` to ``(C*B, ..., out)``: every row through its own client's layer; an empty bias is none."""
    weight_Coi, bias_Co = packing.own(weight_Coi), packing.own(bias_Co)
    _, wide_o, wide_i = weight_Coi.shape
    if (pack := packing.current) is not None:
        y_No = packed_linear(x.reshape(-1, wide_i), weight_Coi, pack)
        y_No = y_No + pack.spread(bias_Co) if bias_Co.numel() else y_No
        return y_No.reshape(*x.shape[:-1], wide_o)
    x_CNi = x.reshape(weight_Coi.shape[0], -1, wide_i).to(weight_Coi.dtype)
    y_CNo = torch.bmm(x_CNi, weight_Coi.transpose(1, 2))
    if bias_Co.numel():
        y_CNo = y_CNo + bias_Co[:, None]
    return y_CNo.reshape(*x.shape[:-1], wide_o)


@final
class ClientLinear(nn.Module):
    """``nn.Linear`` with weights (C, out, in) and bias (C, out), or ``Conv1D`` with weights (C, in, out)."""

    def __init__(self, layer: Any, packing: Packing | None = None) -> None:
        super().__init__()
        self.packing = packing or Packing()
        self.start = _register(self, layer)
        self.transposed = is_conv1d(layer)
        self.out_features, self.in_features = oriented(layer, layer.weight).shape

    def forward(self, x: Tensor) -> Tensor:
        """``(C*B, ..., in)`` to ``(C*B, ..., out)``."""
        weight = self.get_buffer("weight")
        weight_Coi = weight.transpose(1, 2) if self.transposed else weight
        return client_linear(x, weight_Coi, self.get_buffer("bias"), self.packing)


@final
class ClientNorm(nn.Module):
    """``nn.LayerNorm`` over the last axis with weight and bias (C, H)."""

    def __init__(self, layer: nn.LayerNorm, packing: Packing | None = None) -> None:
        super().__init__()
        self.packing = packing or Packing()
        self.start = _register(self, layer)
        self.shape, self.eps = layer.normalized_shape, layer.eps
        if len(self.shape) != 1 or layer.weight is None:
            raise LichenError(
                "a layer norm over several axes or without weights is no head", where="model.adapter.modules_to_save"
            )

    def forward(self, x: Tensor) -> Tensor:
        """``(C*B, ..., H)``, normalised over the last axis."""
        weight_CH, bias_CH = self.get_buffer("weight"), self.get_buffer("bias")
        if (pack := self.packing.current) is not None:
            y_NH = nn.functional.layer_norm(x, self.shape, eps=self.eps).reshape(-1, self.shape[0])
            y_NH = y_NH * pack.spread(weight_CH)
            y_NH = y_NH + pack.spread(bias_CH) if bias_CH.numel() else y_NH
            return y_NH.reshape(x.shape).to(x.dtype)
        y_CNH = nn.functional.layer_norm(x, self.shape, eps=self.eps).reshape(weight_CH.shape[0], -1, self.shape[0])
        y_CNH = y_CNH * weight_CH[:, None]
        if bias_CH.numel():
            y_CNH = y_CNH + bias_CH[:, None]
        return y_CNH.reshape(x.shape).to(x.dtype)


@final
class ClientEmbedding(nn.Module):
    """``nn.Embedding`` with weights (C, V, H)."""

    def __init__(self, layer: nn.Embedding, packing: Packing | None = None) -> None:
        super().__init__()
        self.packing = packing or Packing()
        self.start = _register(self, layer)
        self.padding_idx, self.dtype = layer.padding_idx, layer.weight.dtype
        if layer.max_norm is not None:
            raise LichenError(
                "an embedding with a largest norm changes as it is read", where="model.adapter.modules_to_save"
            )

    def forward(self, ids: Tensor) -> Tensor:
        """``(C*B, ...)`` int64 to ``(C*B, ..., H)``."""
        weight_CVH = self.get_buffer("weight")
        if (pack := self.packing.current) is not None:
            ids_CN = torch.split(ids.flatten(), [b - a for a, b in pairwise(pack.client_offsets)])
        else:
            ids_CN = ids.reshape(weight_CVH.shape[0], -1).unbind(0)
        rows = [
            nn.functional.embedding(i, w, padding_idx=self.padding_idx) for i, w in zip(ids_CN, weight_CVH, strict=True)
        ]
        return torch.cat(rows).reshape(*ids.shape, weight_CVH.shape[-1]).to(self.dtype)


_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.LayerNorm, nn.Embedding)


def is_client_layer(layer: nn.Module) -> bool:
    """Whether a layer has a client-axis form; a subclass may compute anything, and has none."""
    return type(layer) in _LAYERS or is_conv1d(layer)


def wrap_layer(layer: nn.Module, packing: Packing) -> nn.Module:
    """The client-axis form of a layer.

    Raises:
        LichenError: if there is none.
    """
    if isinstance(layer, nn.Linear) or is_conv1d(layer):
        return ClientLinear(layer, packing)
    if isinstance(layer, nn.LayerNorm):
        return ClientNorm(layer, packing)
    if isinstance(layer, nn.Embedding):
        return ClientEmbedding(layer, packing)
    raise LichenError(f"a {type(layer).__name__} cannot be trained whole", where="model.adapter.modules_to_save")
