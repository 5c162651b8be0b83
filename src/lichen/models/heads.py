"""Layers trained whole, one copy a client: linear heads, layer norms, embeddings.

Their tensors come in through ``torch.func.functional_call`` as ``weight`` and ``bias`` with a
leading client axis; the frozen model's own values are only where clients start from.

Legend: C clients, N rows of one client, i in, o out, V vocabulary, H width.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from lichen.core.errors import LichenError

__all__ = ["CLIENT_LAYERS", "ClientEmbedding", "ClientLinear", "ClientNorm", "wrap_layer"]


def _places(module: Any, layer: Any) -> dict[str, Tensor]:
    """Make room for the clients' tensors, and give the values to start from."""
    start: dict[str, Tensor] = dict(layer.named_parameters(recurse=False))
    for name in ("weight", "bias"):
        module.register_buffer(name, torch.empty(0), persistent=False)
    return start


@final
class ClientLinear(nn.Module):
    """``nn.Linear`` with weights (C, out, in) and bias (C, out)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.start = _places(self, layer)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """``(C*B, ..., in)`` to ``(C*B, ..., out)``."""
        weight_Coi, bias_Co = self.get_buffer("weight"), self.get_buffer("bias")
        x_CNi = x.reshape(weight_Coi.shape[0], -1, self.in_features).to(weight_Coi.dtype)
        y_CNo = torch.bmm(x_CNi, weight_Coi.transpose(1, 2))
        if bias_Co.numel():
            y_CNo = y_CNo + bias_Co[:, None]
        return y_CNo.reshape(*x.shape[:-1], self.out_features)


@final
class ClientNorm(nn.Module):
    """``nn.LayerNorm`` over the last axis with weight and bias (C, H)."""

    def __init__(self, layer: nn.LayerNorm) -> None:
        super().__init__()
        self.start = _places(self, layer)
        self.shape, self.eps = layer.normalized_shape, layer.eps
        if len(self.shape) != 1 or layer.weight is None:
            raise LichenError("a layer norm over several axes or without weights is no head", where="adapter.heads")

    def forward(self, x: Tensor) -> Tensor:
        """``(C*B, ..., H)``, normalised over the last axis."""
        weight_CH, bias_CH = self.get_buffer("weight"), self.get_buffer("bias")
        y_CNH = nn.functional.layer_norm(x, self.shape, eps=self.eps).reshape(weight_CH.shape[0], -1, self.shape[0])
        y_CNH = y_CNH * weight_CH[:, None]
        if bias_CH.numel():
            y_CNH = y_CNH + bias_CH[:, None]
        return y_CNH.reshape(x.shape).to(x.dtype)


@final
class ClientEmbedding(nn.Module):
    """``nn.Embedding`` with weights (C, V, H)."""

    def __init__(self, layer: nn.Embedding) -> None:
        super().__init__()
        self.start = _places(self, layer)
        self.padding_idx, self.dtype = layer.padding_idx, layer.weight.dtype
        if layer.max_norm is not None:
            raise LichenError("an embedding with a largest norm changes as it is read", where="adapter.heads")

    def forward(self, ids: Tensor) -> Tensor:
        """``(C*B, ...)`` int64 to ``(C*B, ..., H)``."""
        weight_CVH = self.get_buffer("weight")
        ids_CN = ids.reshape(weight_CVH.shape[0], -1)
        rows = [
            nn.functional.embedding(i, w, padding_idx=self.padding_idx) for i, w in zip(ids_CN, weight_CVH, strict=True)
        ]
        return torch.cat(rows).reshape(*ids.shape, weight_CVH.shape[-1]).to(self.dtype)


CLIENT_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.LayerNorm, nn.Embedding)


def wrap_layer(layer: nn.Module) -> nn.Module:
    """The client-axis form of a layer.

    Raises:
        LichenError: if there is none.
    """
    if isinstance(layer, nn.Linear):
        return ClientLinear(layer)
    if isinstance(layer, nn.LayerNorm):
        return ClientNorm(layer)
    if isinstance(layer, nn.Embedding):
        return ClientEmbedding(layer)
    raise LichenError(f"a {type(layer).__name__} cannot be trained whole", where="adapter.heads")
