"""Exact sums that do not depend on order: tensors times weights in 64-bit fixed point.

Floating-point addition is not associative, so the bytes of a float sum tell in which order the
messages arrived. Here ``value * weight`` is taken in float64, scaled by ``2^scale`` and rounded once to
an integer; integers add exactly, in any order, split or merge, and masks that cancel modulo 2^64
cancel here too. The sum of the largest magnitudes is tracked beside the sums, so an overflow is
refused, whatever the order, instead of wrapping.

References:
    James Demmel and Hong Diep Nguyen. "Fast Reproducible Floating-Point Summation." IEEE ARITH 2013
    (why order matters, and pre-rounding as the cure).
    Keith Bonawitz, Vladimir Ivanov, Ben Kreuter, Antonio Marcedone, H. Brendan McMahan, Sarvar Patel,
    Daniel Ramage, Aaron Segal and Karn Seth. "Practical Secure Aggregation for Privacy-Preserving
    Machine Learning." CCS 2017. https://eprint.iacr.org/2017/281 (sums of masked integers).

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["FixedSum", "add", "merge", "read"]

_LIMIT = 2**63


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FixedSum:
    """A sum so far; the value without arguments is the neutral one.

    Attributes:
        scale: Bits after the binary point.
        count: Clients folded in.
        tensors: int64 sums in units of ``2^-scale``, without client axis.
        bound: Per tensor, the sum of the clients' largest magnitudes in units, which bounds every
            partial sum.
    """

    scale: int = 40
    count: int = 0
    tensors: Tree = field(default_factory=dict)
    bound: Mapping[str, int] = field(default_factory=dict)


def add(total: FixedSum, tensors_C: Mapping[str, Tensor], weight_C: Tensor, *, client_C: Tensor) -> FixedSum:
    """``total`` plus every client's ``tensor * weight``; clients of weight 0 are not even looked at.

    Args:
        total: The sum so far.
        tensors_C: ``(C, ...)``, any real dtype.
        weight_C: ``(C,)`` float64, finite and not negative.
        client_C: ``(C,)``, to name the culprit.

    Raises:
        LichenError: if a weight or value is not finite, a weight is negative, the names or shapes
            differ from those before, or the sum leaves the 64-bit range.
    """
    for client, weight in zip(client_C.tolist(), weight_C.tolist(), strict=True):
        if not 0 <= weight < float("inf"):
            raise LichenError(f"weight {weight} is not a finite number >= 0", where=f"message of client {client}")
    for position, weight in enumerate(weight_C.tolist()):
        if weight > 0:
            one = {name: x_C[position] for name, x_C in tensors_C.items()}
            total = merge(total, _one(one, weight, total.scale, int(client_C[position])))
    return total


def _one(tensors: Mapping[str, Tensor], weight: float, scale: int, client: int) -> FixedSum:
    units: Tree = {}
    bound: dict[str, int] = {}
    for name, x in tensors.items():
        exact = (x.detach().cpu().double() * weight * 2.0**scale).round()
        top = float(exact.abs().max()) if exact.numel() else 0.0
        if not top < float("inf"):
            raise LichenError(
                f"tensor {name!r} is not finite",
                where=f"message of client {client}",
                fix="leave the client out, or lower its learning rate",
            )
        bound[name] = int(top)
        _check_room(name, bound[name], scale)
        units[name] = exact.to(torch.int64)
    return FixedSum(scale=scale, count=1, tensors=units, bound=bound)


def merge(a: FixedSum, b: FixedSum) -> FixedSum:
    """The sum of two sums.

    Raises:
        LichenError: if scales, names or shapes differ, or the sum leaves the 64-bit range.
    """
    if a.scale != b.scale:
        raise LichenError(f"scales {a.scale} and {b.scale} do not add", where="sum", fix="use one scale for a run")
    if not a.count or not b.count:
        return a if a.count else b
    if a.tensors.keys() != b.tensors.keys():
        names = sorted(a.tensors.keys() ^ b.tensors.keys())
        raise LichenError(f"messages differ in tensors: {names[:4]}", where="sum", fix="let one group run one recipe")
    bound = {name: a.bound[name] + b.bound[name] for name in a.bound}
    for name, x in a.tensors.items():
        if x.shape != b.tensors[name].shape:
            raise LichenError(
                f"tensor {name!r} comes as {tuple(x.shape)} and as {tuple(b.tensors[name].shape)}",
                where="sum",
                fix="let one group run one recipe",
            )
        _check_room(name, bound[name], a.scale)
    tensors = {name: x + b.tensors[name] for name, x in a.tensors.items()}
    return replace(a, count=a.count + b.count, tensors=tensors, bound=bound)


def _check_room(name: str, bound: int, scale: int) -> None:
    if bound >= _LIMIT:
        raise LichenError(
            f"the sum of tensor {name!r} may reach {bound / 2**scale:.3g}, past the 64-bit range at {scale} bits "
            "after the point",
            where="sum",
            fix="clip the messages, or lower the scale",
        )


def read(total: FixedSum) -> Tree:
    """The sums as float64, each rounded once."""
    return {name: x.double() * 2.0**-total.scale for name, x in total.tensors.items()}
