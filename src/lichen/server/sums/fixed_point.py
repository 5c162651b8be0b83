"""Order-free exact sums of weighted tensors in 64-bit fixed point.

Floating-point addition is not associative, so the bytes of a float sum tell in which order the
messages arrived. Here ``value * weight`` is taken in float64, scaled by ``2^scale`` and rounded once to
an integer (half to even); integers add exactly, in any order, split or merge, and masks that cancel
modulo 2^64 cancel here too. The sum of the clients' largest magnitudes is tracked beside the sums, so
an overflow is refused, whatever the order, instead of wrapping.

All tensors of a message are one vector in name order, summed by :mod:`lichen.server.sums.kernels`.

References:
    James Demmel and Hong Diep Nguyen. "Fast Reproducible Floating-Point Summation." IEEE ARITH 2013
    (why order matters, and pre-rounding as the cure).
    Keith Bonawitz, Vladimir Ivanov, Ben Kreuter, Antonio Marcedone, H. Brendan McMahan, Sarvar Patel,
    Daniel Ramage, Aaron Segal and Karn Seth. "Practical Secure Aggregation for Privacy-Preserving
    Machine Learning." CCS 2017. https://eprint.iacr.org/2017/281 (sums of masked integers).

Legend: C clients, N numbers of one client's message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.server.sums import kernels

__all__ = [
    "WEIGHT_BITS",
    "FixedSum",
    "Layout",
    "add",
    "check_alike",
    "check_range",
    "check_weights",
    "dump",
    "layout_of",
    "load",
    "merge",
    "read_sums",
]

WEIGHT_BITS = 30
"""Bits after the point of a weight."""

_ABREAST = 64  # clients folded side by side
_NUMBERS = ("scale", "count", "weight", "bound", "lift_bits", "lifted")

Layout = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes without client axis, in name order."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FixedSum:
    """A sum so far; the value without arguments is the neutral one.

    Attributes:
        scale: Bits after the binary point.
        group: Of the messages; None before the first.
        count: Clients folded in.
        weight: Sum of their weights in units of ``2^-30``, of unbounded size.
        layout: Names and shapes, without client axis, in name order.
        units_N: int64 sums in units of ``2^-scale``, one tensor after the other; they lie on
            the device of the last message; None before the first.
        bound: Sum of the clients' largest magnitudes in units, which bounds every partial sum; of lifted
            ones, whose magnitudes are not seen, the largest that they may have.
        lift_bits: A number of a lifted message (:mod:`lichen.server.sums.lifted`) stays below ``2^lift_bits``
            units: 4,096 at scale 40, so that 2,048 clients fit.
        lifted: Clients that came lifted. Where there are any, count and weight are modulo 2^64, too.
    """

    scale: int = 40
    group: str | None = None
    count: int = 0
    weight: int = 0
    layout: Layout = ()
    units_N: Tensor | None = None
    bound: int = 0
    lift_bits: int = 52
    lifted: int = 0


def layout_of(message: Message) -> Layout:
    """Names and shapes of one client's tensors, in name order."""
    return tuple((name, tuple(message.tensors[name].shape[1:])) for name in sorted(message.tensors))


def check_weights(message: Message, weights: Sequence[float]) -> None:
    """Refuse a weight that is not a finite number of 0 or more.

    Raises:
        LichenError: naming the client.
    """
    for client, weight in zip(message.client_C.tolist(), weights, strict=True):
        if not 0 <= weight < float("inf"):
            raise LichenError(f"weight {weight} is not a finite number >= 0", where=f"message of client {client}")


def add(total: FixedSum, message: Message, weight_C: Tensor, factor_C: Tensor | None = None) -> FixedSum:
    """``total`` plus every client's ``tensor * factor``; clients of weight 0 are not even looked at.

    Args:
        total: The sum so far; it stays as it is.
        message: Tensors ``(C, ...)`` of any real dtypes, all on one device.
        weight_C: ``(C,)`` float64, finite and not negative, multiples of ``2^-30``.
        factor_C: The same; None: the weights.

    Raises:
        LichenError: if a weight or value is not finite, a weight is negative, the group, names or
            shapes differ from those before, or the sum leaves the 64-bit range.
    """
    weights = weight_C.tolist()
    factors = weights if factor_C is None else factor_C.tolist()
    check_weights(message, weights)
    counted = [position for position, weight in enumerate(weights) if weight > 0]
    layout = layout_of(message)
    if not counted or not layout:
        return total
    new = replace(total, group=message.group, layout=layout)
    if total.units_N is not None:
        check_alike((total.group, total.layout), (new.group, new.layout))
    units_N, bound = total.units_N, total.bound
    rows = [message.tensors[name].detach().reshape(len(weights), prod(shape)) for name, shape in layout]
    for start in range(0, len(counted), _ABREAST):
        some = counted[start : start + _ABREAST]
        adjoining = some[-1] + 1 - some[0] == len(some)
        scaled_C = torch.tensor([factors[c] * 2.0**total.scale for c in some], dtype=torch.float64)
        units_N, top_C = kernels.add_rows(
            units_N, [x[some[0] : some[-1] + 1] if adjoining else x[some] for x in rows], scaled_C
        )
        for c, top in zip(some, top_C.tolist(), strict=True):
            if not top < float("inf"):
                raise LichenError(
                    f"tensor {_largest(layout, rows, [c])!r} is not finite",
                    where=f"message of client {int(message.client_C[c])}",
                    fix="leave the client out, or lower its learning rate",
                )
            bound += int(top)
        check_range(bound, total.scale, of=lambda: _largest(layout, rows, counted))
    return replace(
        new,
        count=_wrapped(total.count + len(counted), total.lifted),
        weight=_wrapped(total.weight + sum(int(weight * 2**WEIGHT_BITS) for weight in weights), total.lifted),
        units_N=units_N,
        bound=bound,
    )


def _wrapped(x: int, lifted: int) -> int:
    """Modulo 2^64, from -2^63 on, where masks may lie over it; as it is where nothing came lifted."""
    return (x + kernels.LIMIT) % (2 * kernels.LIMIT) - kernels.LIMIT if lifted else x


def _largest(layout: Layout, rows: Sequence[Tensor], clients: Sequence[int]) -> str:
    """The tensor with the largest magnitude among these clients; what is no number is largest."""
    tops = [float(x[clients].double().abs().nan_to_num(math.inf).amax()) if x.numel() else 0.0 for x in rows]
    return layout[tops.index(max(tops))][0]


def merge(a: FixedSum, b: FixedSum) -> FixedSum:
    """The sum of two sums.

    Raises:
        LichenError: if scales, groups, names or shapes differ, or the sum leaves the 64-bit range.
    """
    if a.scale != b.scale:
        raise LichenError(f"scales {a.scale} and {b.scale} do not add", where="sum", fix="use one scale for a run")
    if a.units_N is None or b.units_N is None:
        return b if a.units_N is None else a
    check_alike((a.group, a.layout), (b.group, b.layout))
    check_range(a.bound + b.bound, a.scale)
    lifted = a.lifted + b.lifted
    return replace(
        a,
        count=_wrapped(a.count + b.count, lifted),
        weight=_wrapped(a.weight + b.weight, lifted),
        units_N=a.units_N + b.units_N.to(a.units_N.device),
        bound=a.bound + b.bound,
        lifted=lifted,
    )


def check_alike(a: tuple[str | None, Layout], b: tuple[str | None, Layout]) -> None:
    """Refuse two totals, each as ``(group, layout)``, that do not go into one.

    Raises:
        LichenError: naming the group, or the tensors in which they differ.
    """
    if a[0] != b[0]:
        raise LichenError(f"groups {a[0]!r} and {b[0]!r} do not add", where="sum", fix="sum each group alone")
    if a[1] == b[1]:
        return
    have, come = dict(a[1]), dict(b[1])
    if have.keys() != come.keys():
        raise LichenError(
            f"messages differ in tensors: {sorted(have.keys() ^ come.keys())[:4]}",
            where="sum",
            fix="let one group run one recipe",
        )
    name = next(name for name in have if have[name] != come[name])
    raise LichenError(
        f"tensor {name!r} comes as {have[name]} and as {come[name]}", where="sum", fix="let one group run one recipe"
    )


def check_range(bound: int, scale: int, *, of: Callable[[], str] | None = None) -> None:
    """Refuse a sum whose bound, in units of ``2^-scale``, leaves the 64-bit range.

    Raises:
        LichenError: naming the tensor that ``of`` finds, where it is given.
    """
    if bound >= kernels.LIMIT:
        raise LichenError(
            f"the sum{f' of tensor {of()!r}' if of else ''} may reach {bound / 2**scale:.3g}, past the 64-bit range at "
            f"{scale} bits after the point",
            where="sum",
            fix="clip the messages, or lower the scale",
        )


def read_sums(total: FixedSum) -> Tree:
    """The sums as float64, each rounded once, on the CPU."""
    if total.units_N is None:
        return {}
    sizes = [prod(shape) for _, shape in total.layout]
    parts = torch.split(total.units_N.cpu().double() * 2.0**-total.scale, sizes)
    return {name: part.view(shape) for (name, shape), part in zip(total.layout, parts, strict=True)}


def dump(total: FixedSum) -> tuple[Tree, dict[str, Any]]:
    """``(tensors, header)`` that stand for the sum; the header is what JSON can write."""
    header = {name: getattr(total, name) for name in (*_NUMBERS, "group", "layout")}
    return {} if total.units_N is None else {"units": total.units_N.cpu()}, header


def load(tensors: Tree, header: Mapping[str, Any]) -> FixedSum:
    """Undo :func:`dump`.

    Raises:
        LichenError: if these are not a sum.
    """
    try:
        layout = tuple((str(name), tuple(int(n) for n in shape)) for name, shape in header["layout"])
        whole = {name: int(header[name]) for name in _NUMBERS}
        came = whole["count"] or whole["lifted"]
        group, units_N = header["group"], tensors["units"] if came else None
    except (KeyError, TypeError, ValueError) as error:
        raise LichenError(f"these are not a sum: {error!r}", where="sum", fix="send it again") from None
    numbers = sum(prod(shape) for _, shape in layout)
    if units_N is not None and (units_N.dtype != torch.int64 or units_N.shape != (numbers,)):
        raise LichenError(f"a sum of {numbers} numbers comes as {tuple(units_N.shape)} {units_N.dtype}", where="sum")
    return FixedSum(group=group, layout=layout, units_N=units_N, **whole)
