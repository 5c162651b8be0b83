"""Sums the clients' weighted products ``B_k A_k`` beside the mean, in constant memory.

A layer's pairs are kept as they came while they take less memory than the layer's whole product in
float64. From there on the layer is one exact sum of ``w_k ΔB_k ΔA_k`` (:mod:`lichen.server.sums.kernels`), to
which every pair's product is added and then forgotten. Which of the two it is at the end, and its bytes,
depend on the set of clients alone, and not on their order or on how totals were merged.

The products are those of the changes, as they were sent. With the means of the changes, which the exact
sums give, those of the adapters follow when the round closes:

    Σ p_k B_k A_k = Σ p_k ΔB_k ΔA_k + ΔB̄ A + B (S A + ΔĀ),

where the diagonal S holds the share of the clients that trained each direction: ones where ranks are equal.

Rules that want the pairs themselves ask for a total that is never summed whole: its memory is the pairs.

Legend: C clients, m rows of a layer's weight (out), n columns (in), r adapter rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, final

from torch import Tensor

from lichen.core.conventions.factor_pairs import A as A_END
from lichen.core.conventions.factor_pairs import B as B_END
from lichen.core.conventions.factor_pairs import factor_names, layers_with_factors, rank_axis
from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.server.lowrank import groups
from lichen.server.lowrank.groups import GroupSums
from lichen.server.sums import fixed_point, kernels
from lichen.server.sums.fixed_point import WEIGHT_BITS

__all__ = ["Key", "LowRankTotal", "add", "check", "dump", "load", "mean_product", "merge", "pairs_of"]

Pair = tuple[int, int, float, Tensor, Tensor]
"""Client, version, weight, ``ΔB (m, r)`` and ``ΔA (r, n)``."""

Key = tuple[int, int]
"""Client and version: one answer."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """One layer's products: ``pairs`` while they are small, ``units_mn`` from there on.

    Attributes:
        pairs: In order of client and version.
        units_mn: int64, in units of the mean's ``2^-scale``; None while there are pairs.
        bound: What the sum of magnitudes cannot exceed, in units.
    """

    pairs: tuple[Pair, ...] = ()
    units_mn: Tensor | None = None
    bound: int = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRankTotal:
    """The exact sums so far, and the sum of products.

    Attributes:
        sums: Of all tensors.
        whole: Whether a layer may be summed whole once its pairs are larger.
        answers: Client and version of each answer folded in, ascending.
        layers: By name; only layers of which both halves are sent.
    """

    sums: GroupSums = field(default_factory=GroupSums)
    whole: bool = True
    answers: tuple[Key, ...] = ()
    layers: Mapping[str, Layer] = field(default_factory=dict)


def add(total: LowRankTotal, message: Message, weight_C: Tensor) -> LowRankTotal:
    """``total`` plus every client of the message.

    Raises:
        LichenError: as :func:`lichen.server.lowrank.groups.add`, or if the halves of a layer differ in rank.
    """
    sums = groups.add(total.sums, message, weight_C)
    who = [
        (c, client, version, weight)
        for c, (client, version, weight) in enumerate(
            zip(message.client_C.tolist(), message.version_C.tolist(), weight_C.tolist(), strict=True)
        )
        if weight > 0
    ]
    found = dict(total.layers)
    for layer in layers_with_factors(message.tensors):
        name_A, name_B = factor_names(layer)
        if name_B in message.tensors:
            A_Crn, B_Cmr = message.tensors[name_A].detach(), message.tensors[name_B].detach()
            if B_Cmr.dim() != 3 or A_Crn.dim() != 3 or B_Cmr.shape[2] != A_Crn.shape[1]:
                raise LichenError(
                    f"the halves of layer {layer!r} come as {tuple(B_Cmr.shape[1:])} and {tuple(A_Crn.shape[1:])}",
                    where="aggregator",
                    fix="let a client train as many columns of lora_B as rows of lora_A",
                )
            pairs = tuple((client, version, weight, B_Cmr[c], A_Crn[c]) for c, client, version, weight in who)
            if pairs:
                new = Layer(pairs=pairs)
                found[layer] = _join(layer, found.get(layer, Layer()), new, sums.scale, whole=total.whole)
    answers = sorted((*total.answers, *((client, version) for _, client, version, _ in who)))
    return replace(total, sums=sums, answers=tuple(answers), layers=found)


def merge(a: LowRankTotal, b: LowRankTotal) -> LowRankTotal:
    """The sum of two totals of one rule; raises as :func:`lichen.server.lowrank.groups.merge`."""
    sums = groups.merge(a.sums, b.sums)
    found = {
        layer: _join(layer, a.layers.get(layer, Layer()), b.layers.get(layer, Layer()), sums.scale, whole=a.whole)
        for layer in sorted(a.layers.keys() | b.layers.keys())
    }
    return replace(a, sums=sums, answers=tuple(sorted((*a.answers, *b.answers))), layers=found)


def _join(name: str, a: Layer, b: Layer, scale: int, *, whole: bool) -> Layer:
    pairs = tuple(sorted((*a.pairs, *b.pairs), key=lambda pair: pair[:3]))
    if not whole or (a.units_mn is None and b.units_mn is None and _fits(pairs)):
        return Layer(pairs=pairs)
    units_mn, bound = a.units_mn, a.bound + b.bound
    if b.units_mn is not None:
        units_mn = b.units_mn if units_mn is None else units_mn + b.units_mn.to(units_mn.device)
    if pairs:
        factors = [weight * 2.0**scale for _, _, weight, _, _ in pairs]
        units_mn, top = kernels.add_products(units_mn, [(B, A) for *_, B, A in pairs], factors)
        bound += top
    fixed_point.check_range(bound, scale, of=lambda: f"{name}.lora_B @ lora_A")
    return Layer(units_mn=units_mn, bound=bound)


def _fits(pairs: tuple[Pair, ...]) -> bool:
    """Whether these take less memory than the product of one of them in float64."""
    if not pairs:
        return True
    m, n = pairs[0][3].shape[0], pairs[0][4].shape[1]
    return sum(B.nbytes + A.nbytes for *_, B, A in pairs) < 8 * m * n


def check(total: LowRankTotal) -> None:
    """Refuse what has no mean.

    Raises:
        LichenError: if nothing was folded in, a client answered one version twice, or of one layer some
            clients sent one half and some another or both.
    """
    if not total.sums.count:
        raise LichenError("no client contributed", where="aggregator", fix="invite more clients or skip the round")
    for one, other in pairwise(total.answers):
        if one == other:
            raise LichenError(
                f"client {one[0]} answered version {one[1]} twice", where="aggregator", fix="count each once"
            )
    halves: dict[str, set[str]] = {}
    for _, layout in total.sums.sums:
        came: dict[str, str] = {}
        for name, _ in layout:
            if rank_axis(name) is not None:
                layer, _, half = name.rpartition(".")
                came[layer] = came.get(layer, "") + half
        for layer, sent in came.items():
            halves.setdefault(layer, set()).add(sent)
    for layer in sorted(halves):
        if len(halves[layer]) > 1:
            raise LichenError(
                f"clients sent different halves of layer {layer!r}",
                where="aggregator",
                fix="let all clients of a round train lora_A, lora_B, or both",
            )


def pairs_of(total: LowRankTotal, layer: str) -> list[tuple[Key, float, Tensor, Tensor]]:
    """``(answer, share, ΔB_k, ΔA_k)`` of each client that sent both halves, float64, on the CPU."""
    pairs = total.layers.get(layer, Layer()).pairs
    weight = groups.weight_of(total.sums, factor_names(layer)[0]) / 2**WEIGHT_BITS
    return [((client, version), w / weight, B.cpu().double(), A.cpu().double()) for client, version, w, B, A in pairs]


def mean_product(total: LowRankTotal, layer: str) -> Tensor | None:
    """``Σ p_k ΔB_k ΔA_k (m, n)`` in float64, where the layer is held whole; None where its pairs are."""
    units_mn = total.layers.get(layer, Layer()).units_mn
    if units_mn is None:
        return None
    weight = groups.weight_of(total.sums, factor_names(layer)[0]) / 2**WEIGHT_BITS
    mean_mn: Tensor = units_mn.cpu().double() * 2.0**-total.sums.scale / weight
    return mean_mn


def dump(total: LowRankTotal) -> tuple[Tree, dict[str, Any]]:
    """``(tensors, header)`` that stand for a total; the header is what JSON can write."""
    tensors, sums = groups.dump(total.sums)
    header: dict[str, Any] = {"sums": sums, "whole": total.whole, "answers": total.answers, "layers": {}}
    for name, layer in total.layers.items():
        header["layers"][name] = {"bound": layer.bound, "pairs": [pair[:3] for pair in layer.pairs]}
        if layer.units_mn is not None:
            tensors[f"{name}.units"] = layer.units_mn.cpu()
        for k, (*_, B, A) in enumerate(layer.pairs):
            name_A, name_B = factor_names(f"{name}.{k}")
            tensors[name_B], tensors[name_A] = B.cpu(), A.cpu()
    return tensors, header


def load(tensors: Tree, header: Mapping[str, Any]) -> LowRankTotal:
    """Undo :func:`dump`.

    Raises:
        LichenError: if these are not a total.
    """
    try:
        sums = groups.load(tensors, header["sums"])
        found = {
            str(name): Layer(
                pairs=tuple(
                    (int(c), int(v), float(w), tensors[f"{name}.{k}.{B_END}"], tensors[f"{name}.{k}.{A_END}"])
                    for k, (c, v, w) in enumerate(layer["pairs"])
                ),
                units_mn=tensors.get(f"{name}.units"),
                bound=int(layer["bound"]),
            )
            for name, layer in header["layers"].items()
        }
        answers = tuple((int(client), int(version)) for client, version in header["answers"])
        whole = bool(header["whole"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LichenError(f"these are not a total: {error!r}", where="aggregator", fix="send it again") from None
    return LowRankTotal(sums=sums, whole=whole, answers=answers, layers=found)
