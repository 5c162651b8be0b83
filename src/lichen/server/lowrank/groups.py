"""Exact sums over clients that train different ranks or layers.

One :class:`lichen.server.sums.fixed_point.FixedSum` insists on one layout, so there is one for each group and
layout that came. They are joined when the round closes: a tensor's integer sums are padded with zeros to
the shared tensor's rank and added, which is exact, so that neither order nor grouping shows in the bytes.

A tensor's mean is over the clients that sent it. Of an adapter a client of rank r_k trained the first r_k
rows of A and columns of B, and the rest of its adapter is zero: the mean of zero-padded adapters is

    x̄_j = share_j x_j + Σ p_k pad(Δ_k)_j,      share_j = Σ p_k over the clients with r_k > j,

which is the plain mean where the ranks are equal.

References:
    Yae Jee Cho, Luyang Liu, Zheng Xu, Aldi Fahrezi and Gauri Joshi. "Heterogeneous LoRA for Federated
    Fine-tuning of On-Device Foundation Models." EMNLP 2024. https://arxiv.org/abs/2401.06432 (zero-padding)

Legend: r adapter rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.conventions.factor_pairs import rank_axis
from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.server.sums import fixed_point
from lichen.server.sums.fixed_point import WEIGHT_BITS, FixedSum, Layout

__all__ = ["GroupSums", "MeanChange", "add", "dump", "load", "means", "merge", "weight_of"]

Key = tuple[str, Layout]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupSums:
    """Sums so far; the value without arguments is the neutral one.

    Attributes:
        scale: Bits after the binary point of all sums.
        sums: By group and layout.
    """

    scale: int = 40
    sums: Mapping[Key, FixedSum] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Clients folded in."""
        return sum(one.count for one in self.sums.values())

    @property
    def weight(self) -> int:
        """Sum of their weights in units of ``2^-30``."""
        return sum(one.weight for one in self.sums.values())


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeanChange:
    """One tensor's mean change.

    Attributes:
        padded: Mean of the zero-padded changes of the clients that sent it, float64.
        share_r: Share of their weight that trained each direction, float64; None: all trained all.
        axis: Where the directions lie.
    """

    padded: Tensor
    share_r: Tensor | None = None
    axis: int = 0

    def over(self, shared: Tensor) -> Tensor:
        """What turns ``shared`` into the mean of the zero-padded tensors, float64."""
        if self.share_r is None:
            return self.padded
        absent = (1 - self.share_r).unsqueeze(1 - self.axis)
        return self.padded - absent * shared.cpu().double()


def add(total: GroupSums, message: Message, weight_C: Tensor) -> GroupSums:
    """``total`` plus every client of the message.

    Raises:
        LichenError: as :func:`lichen.server.sums.fixed_point.add`, but layouts may differ.
    """
    key = message.group, fixed_point.layout_of(message)
    new = fixed_point.add(total.sums.get(key, FixedSum(scale=total.scale)), message, weight_C)
    return _checked(replace(total, sums={**total.sums, key: new})) if new.count else total


def merge(a: GroupSums, b: GroupSums) -> GroupSums:
    """The sum of two; raises as :func:`lichen.server.sums.fixed_point.merge`."""
    if a.scale != b.scale:
        raise LichenError(f"scales {a.scale} and {b.scale} do not add", where="sum", fix="use one scale for a run")
    none = FixedSum(scale=a.scale)
    keys = sorted(a.sums.keys() | b.sums.keys())
    joined = {key: fixed_point.merge(a.sums.get(key, none), b.sums.get(key, none)) for key in keys}
    return _checked(replace(a, sums=joined))


def _checked(total: GroupSums) -> GroupSums:
    # Padding adds nothing, so the bounds of the parts together bound what their join can reach.
    fixed_point.check_range(sum(one.bound for one in total.sums.values()), total.scale)
    return total


def weight_of(total: GroupSums, name: str) -> int:
    """Weight of the clients that sent a tensor, in units of ``2^-30``."""
    return sum(one.weight for (_, layout), one in total.sums.items() if name in dict(layout))


def means(total: GroupSums, shared: Tree) -> dict[str, MeanChange]:
    """The mean change of every tensor that somebody sent, in name order.

    Args:
        total: At least one client.
        shared: Gives the ranks; a name it lacks has the largest rank that was sent.

    Raises:
        LichenError: if a tensor fits neither the shared one nor its first directions.
    """
    came: dict[str, list[tuple[int, Tensor]]] = {}
    for key in sorted(total.sums):
        for name, units in _parts(total.sums[key]):
            came.setdefault(name, []).append((total.sums[key].weight, units))
    return {name: _mean(name, came[name], total.scale, shared.get(name)) for name in sorted(came)}


def _parts(one: FixedSum) -> Iterator[tuple[str, Tensor]]:
    assert one.units_N is not None  # a sum is kept from its first client on
    sizes = [prod(shape) for _, shape in one.layout]
    for (name, shape), part in zip(one.layout, torch.split(one.units_N.cpu(), sizes), strict=True):
        yield name, part.view(shape)


def _mean(name: str, came: list[tuple[int, Tensor]], scale: int, shared: Tensor | None) -> MeanChange:
    axis = rank_axis(name)
    like = max((x for _, x in came), key=lambda x: x.shape[axis or 0] if x.dim() else 0) if shared is None else shared
    full = tuple(like.shape)
    for _, x in came:
        if axis is None or x.dim() != 2 or len(full) != 2:
            fits = tuple(x.shape) == full
        else:
            fits = x.shape[1 - axis] == full[1 - axis] and x.shape[axis] <= full[axis]
        if not fits:
            raise LichenError(
                f"tensor {name!r} has shape {tuple(x.shape)}, the model's is {full}",
                where="aggregator",
                fix="let clients and server load the same recipe",
            )
    weight = sum(w for w, _ in came)
    if all(tuple(x.shape) == full for _, x in came):
        units, share_r = sum((x for _, x in came[1:]), came[0][1]), None
    else:
        assert axis is not None  # other tensors have equal shapes
        units = torch.zeros(full, dtype=torch.int64)
        for _, x in came:
            units.narrow(axis, 0, x.shape[axis]).add_(x)
        reach = [sum(w for w, x in came if x.shape[axis] > j) for j in range(full[axis])]
        share_r = torch.tensor([w / weight for w in reach], dtype=torch.float64)
    padded = units.double() * 2.0**-scale / (weight / 2**WEIGHT_BITS)
    return MeanChange(padded=padded, share_r=share_r, axis=axis or 0)


def dump(total: GroupSums) -> tuple[Tree, dict[str, Any]]:
    """``(tensors, header)`` that stand for the sums; the header is what JSON can write."""
    tensors: Tree = {}
    headers = []
    for position, key in enumerate(sorted(total.sums)):
        parts, header = fixed_point.dump(total.sums[key])
        headers.append(header)
        tensors |= {f"sum{position}/{name}": x for name, x in parts.items()}
    return tensors, {"scale": total.scale, "sums": headers}


def load(tensors: Tree, header: Mapping[str, Any]) -> GroupSums:
    """Undo :func:`dump`.

    Raises:
        LichenError: if these are not such sums.
    """
    sums: dict[Key, FixedSum] = {}
    try:
        for position, one in enumerate(header["sums"]):
            found = fixed_point.load({"units": tensors[f"sum{position}/units"]}, one)
            sums[str(found.group), found.layout] = found
        return GroupSums(scale=int(header["scale"]), sums=sums)
    except (KeyError, TypeError, ValueError) as error:
        raise LichenError(f"these are not sums: {error!r}", where="sum", fix="send it again") from None
