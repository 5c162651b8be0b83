"""Rounds a module's state to float16, or to int8 with one scale for each row of a weight.

A weight's largest number of a row is 127 times the row's scale, and zero is zero; tensors of one axis, such as biases
and norms, stay float32 beside int8, since they are few. The scales of ``NAME`` lie beside it as ``NAME_scale``.

References:
    Raghuraman Krishnamoorthi. "Quantizing deep convolutional networks for efficient inference: A whitepaper." 2018.
    https://arxiv.org/abs/1806.08342 (weights symmetric, one scale an output channel)
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["ROUNDED", "SCALE", "StudentBits", "restore_state", "round_state"]

StudentBits = Literal["int8", "f16", "f32"]
"""How numbers of a student are written, from small to large."""
ROUNDED: tuple[StudentBits, ...] = get_args(StudentBits)[:2]

SCALE = "_scale"
_MOST = 127


def round_state(state: Tree, bits: StudentBits) -> Tree:
    """The state in so many bits.

    Args:
        state: Float32 tensors by name.
        bits: ``f32`` leaves it as it is.

    Raises:
        LichenError: if a tensor holds numbers that are not finite.

    >>> x = round_state({"weight": torch.tensor([[1.0, -0.5], [0.0, 0.0]])}, "int8")
    >>> x["weight"].tolist(), [round(float(s), 4) for s in x["weight_scale"]]
    ([[127, -64], [0, 0]], [0.0079, 1.0])
    """
    for name, x in state.items():
        if not bool(x.isfinite().all()):
            what = f"tensor {name!r} holds numbers that are not finite"
            raise LichenError(what, where="--student", fix="train it anew, with a lower learning rate")
    if bits == "f32":
        return dict(state)
    if bits == "f16":
        return {name: x.half() for name, x in state.items()}
    out: Tree = {}
    for name, x in state.items():
        if x.dim() < 2:
            out[name] = x
            continue
        scale_F = x.flatten(1).abs().amax(1) / _MOST
        scale_F = torch.where(scale_F > 0, scale_F, torch.ones_like(scale_F))
        out[name] = (x / _along(scale_F, x)).round().clamp(-_MOST, _MOST).to(torch.int8)
        out[f"{name}{SCALE}"] = scale_F
    return out


def restore_state(state: Tree) -> Tree:
    """The float32 tensors that a rounded state stands for."""
    scales = {name: x for name, x in state.items() if name.endswith(SCALE)}
    out: Tree = {}
    for name, x in state.items():
        if name not in scales:
            scale_F = scales.get(f"{name}{SCALE}")
            out[name] = x.float() if scale_F is None else x.float() * _along(scale_F, x)
    return out


def _along(scale_F: Tensor, x: Tensor) -> Tensor:
    return scale_F.view(-1, *[1] * (x.dim() - 1))
