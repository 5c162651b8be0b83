"""RMS norm of a frozen model, with as few passes over memory as it needs.

    y = x / sqrt(mean(x²) + ε) * w

transformers writes it out in five operations, each of which is kept for the way back; a frozen weight
needs two things: x and one number a token.

References:
    Zhang and Sennrich (2019). Root Mean Square Layer Normalization. NeurIPS 2019, arXiv:1910.07467.

Legend: N tokens, H width.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from lichen.models.packing.packing import Packing

__all__ = ["quicken_norms"]


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """The norm over the last axis, in the dtype of ``x``; the weight gets no gradient."""
    if x.is_cuda or x.dtype != torch.float32:
        return nn.functional.rms_norm(x, weight_H.shape, weight_H, eps)
    y: Tensor = _Norm.apply(x, weight_H, eps)  # type: ignore[no-untyped-call]
    return y


@final
class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(size.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight_H, scale)
        return (x * scale).mul_(weight_H)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_H, scale = ctx.saved_tensors
        g = dy * weight_H
        along = (g * x).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(x.shape[-1])
        return g.mul_(scale).addcmul_(x, along, value=-1), None, None


def quicken_norms(model: Any, packing: Packing) -> None:
    """Let every layer that computes this very formula do so in packed calls; whether it does is tried out."""
    for layer in model.modules():
        weight, eps = getattr(layer, "weight", None), getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
        if not (type(layer).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and isinstance(eps, float)):
            continue
        x = torch.linspace(-2, 3, 2 * weight.shape[0], dtype=weight.dtype, device=weight.device).view(2, -1)
        with torch.no_grad():
            same = torch.allclose(layer(x).float(), rms_norm(x, weight, eps).float(), rtol=2e-2, atol=1e-4)
        if same and not weight.requires_grad:
            _quicken(layer, packing, eps)


def _quicken(layer: Any, packing: Packing, eps: float) -> None:
    plain = layer.forward

    def forward(x: Tensor) -> Tensor:
        # In double precision the model's own way through single precision is what there is to agree with.
        return plain(x) if packing.current is None or x.dtype == torch.float64 else rms_norm(x, layer.weight, eps)

    layer.forward = forward
