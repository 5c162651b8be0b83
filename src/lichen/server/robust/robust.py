"""Robust aggregation: a change that a few lying clients cannot lead where they like.

A rule looks at the clients' messages one by one (:mod:`lichen.server.robust.table` lists them), so no mask may lie over
a message. Rules by distances give each client a coefficient (:mod:`lichen.server.robust.choices`), rules by coordinate
look at each number by itself (:mod:`lichen.server.robust.coordinates`). Every client of a weight above 0 counts 1,
whatever weight it tells: a liar would tell a large one.

What distances are between, for adapters of LoRA:

- ``of="factors"``: all numbers that are sent, one after the other. A and B of a layer are numbers like others.
- ``of="products"``: for each layer, the changes that clients make to its product ``B A``, which is what the model
  feels; equal products may have unlike factors. Each layer chooses by itself, and its coefficients go to both of its
  factors. What is no pair of factors is one more group, by its numbers.

Papers: at each rule.

Legend: C clients, N numbers of one client.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from math import prod
from typing import Any, Literal, final

import torch
from torch import Tensor

from lichen.core.conventions.factor_pairs import factor_names, layers_with_factors
from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.mean import fitted
from lichen.server.robust import choices, rows
from lichen.server.robust.coordinates import middle_N
from lichen.server.robust.gram import gram_CC, product_gram_CC
from lichen.server.robust.rows import Row, RowTotal, Span, block_CN, stretches
from lichen.server.robust.table import ROBUST
from lichen.server.single import SingleMessages
from lichen.server.sums.fixed_point import Layout

__all__ = ["NO_STEP", "OverRows", "Robust", "combine", "tree_of"]

NO_STEP = "too_few"
"""The metric, at 1, of a round to which fewer clients came than its rule needs, so that it changes nothing."""


class OverRows(SingleMessages, ABC):
    """An aggregator whose total is the clients' rows."""

    __slots__ = ()

    @property
    @abstractmethod
    def memory(self) -> int:
        """Bytes of rows that may lie in memory; more go to a temporary file."""

    def zero(self) -> RowTotal:
        """Nothing folded in."""
        return RowTotal(memory=self.memory)

    def add(self, total: RowTotal, message: Message, discount_C: Tensor | None = None) -> RowTotal:
        """A row for every client of the message, times its discount; raises as :func:`rows.add`."""
        return rows.add(total, message, discount_C)

    def clients(self, total: RowTotal) -> int:
        """Clients folded in."""
        return len(total.rows)

    def merge(self, a: RowTotal, b: RowTotal) -> RowTotal:
        """The rows of both; raises as :func:`rows.merge`."""
        return rows.merge(a, b)

    def dump(self, total: RowTotal) -> tuple[Tree, dict[str, Any]]:
        """``(tensors, header)`` of a total, all of it in memory."""
        return rows.dump(total)

    def load(self, tensors: Tree, header: Mapping[str, Any]) -> RowTotal:
        """Undo :meth:`dump`; raises as :func:`rows.load`."""
        return rows.load(tensors, header, memory=self.memory)


@final
@dataclass(frozen=True, slots=True)
class Robust(OverRows):
    """One of the robust rules.

    Args:
        rule: Its name, one of :data:`lichen.server.robust.table.ROBUST`.
        liars: f, the clients of a round that may lie. A round to which fewer come than the rule needs for
            that changes nothing, and has the metric ``too_few``.
        mixing: Every row becomes the mean of its n − f nearest ones first (NNM).
        of: What distances are between: see above.
        radius: The norm that rows are cut to, in centred_clipping and norm_bound; None: the median norm of the
            round, in norm_bound.
        iterations: Steps of geometric_median and centred_clipping.
        smoothing: What a distance counts at least, in geometric_median.
        memory: Bytes of rows that lie in memory; more go to a temporary file.

    Raises:
        LichenError: if a value is unknown or out of range.
    """

    rule: str
    _: KW_ONLY
    liars: int = 1
    mixing: bool = False
    of: Literal["factors", "products"] = "factors"
    radius: float | None = None
    iterations: int = 10
    smoothing: float = 1e-6
    memory: int = 2**30

    def __post_init__(self) -> None:
        known_rules = [name for name, rule in ROBUST.items() if rule.looks_at != "reference"]
        if self.rule not in known_rules:
            fix = "use FLTrust" if self.rule in ROBUST else f"use {', '.join(known_rules)}"
            raise LichenError(f"unknown rule {self.rule!r}", where="aggregator.rule", fix=fix)
        known = ROBUST[self.rule]
        if self.liars < 0:
            raise LichenError(f"{self.liars} liars", where="aggregator.liars", fix="use 0 or more")
        if self.of == "products" and known.looks_at != "distances":
            raise LichenError(
                f"{self.rule} looks at each number by itself", where="aggregator.of", fix="use of: factors"
            )
        if self.of not in ("factors", "products"):
            raise LichenError(f"no distances of {self.of!r}", where="aggregator.of", fix="use factors or products")
        if self.radius is not None and not 0 < self.radius < math.inf:
            raise LichenError(f"{self.radius} is no radius", where="aggregator.radius", fix="use a number > 0")
        if self.radius is None and known.radius:
            raise LichenError(f"{self.rule} needs a radius", where="aggregator.radius", fix="give one, such as 1.0")
        if self.iterations < 1 or not self.smoothing > 0 or self.memory < 0:
            raise LichenError("a number is out of range", where="aggregator", fix="use iterations of 1 or more")

    @property
    def one_version(self) -> bool:
        """Late messages may come: their rows count by their discount."""
        return False

    def close(self, total: RowTotal, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)``: the rule's change in the dtypes of ``shared``; empty where too few came.

        Metrics are ``clients``; ``dropped``, the clients of which nothing is in the change, where the rule
        chooses; ``shortened``, those that were cut, in norm_bound; or ``too_few``.

        Raises:
            LichenError: if nothing was folded in, a client answered one version twice, or a shape differs from
                that in ``shared``.
        """
        came, rule = rows.ordered(total), ROBUST[self.rule]
        metrics = {"clients": float(len(came))}
        if len(came) < rule.least(self.liars):
            return Shared(), {**metrics, NO_STEP: 1.0}
        spans = rows.spans_of(total.layout)
        out_N = torch.empty(sum(prod(shape) for _, shape in total.layout), dtype=torch.float64)
        if rule.looks_at == "coordinates":
            self._by_coordinate(came, (0, len(out_N)), out_N)
        else:
            weights_GC = []
            for group, gram in self._groups(came, spans, shared):
                coefficient_C = self._coefficients(gram)
                combine(came, coefficient_C, group, out_N)
                weights_GC.append(coefficient_C)
            top_C = torch.stack(weights_GC).amax(0)
            if rule.drops:
                metrics["dropped"] = float((top_C == 0).sum())
            elif self.rule == "norm_bound" and not self.mixing:
                metrics["shortened"] = float((top_C < 1 / len(came)).sum())
        return Shared(fitted(tree_of(out_N, total.layout), shared.trainable)), metrics

    def _groups(self, came: Sequence[Row], spans: dict[str, Span], shared: Shared) -> list[tuple[list[Span], Tensor]]:
        """Columns that share their coefficients, and the inner products of the clients there."""
        layers = [one for one in layers_with_factors(spans) if factor_names(one)[1] in spans]
        if self.of == "factors" or not layers:
            whole = [(0, max(last for _, last in spans.values()))]
            return [(whole, gram_CC(came, whole))]
        pairs = [[spans[name] for name in factor_names(layer)] for layer in layers]
        grams = [product_gram_CC(came, spans, layer, shared.trainable) for layer in layers]
        factors = {name for layer in layers for name in factor_names(layer)}
        others = [span for name, span in spans.items() if name not in factors]
        more = [(others, gram_CC(came, others))] if others else []
        return [*zip(pairs, grams, strict=True), *more]

    def _coefficients(self, gram: Tensor) -> Tensor:
        """What each client counts; float64 ``(C,)``."""
        mix_CC = choices.mixing_CC(gram, self.liars) if self.mixing else None
        if mix_CC is not None:
            gram = mix_CC @ gram @ mix_CC.T
        if self.rule == "krum":
            coefficient_C = choices.krum(gram, self.liars)
        elif self.rule == "multi_krum":
            coefficient_C = choices.multi_krum(gram, self.liars)
        elif self.rule == "geometric_median":
            coefficient_C = choices.geometric_median(gram, iterations=self.iterations, smoothing=self.smoothing)
        elif self.rule == "centred_clipping":
            assert self.radius is not None
            coefficient_C = choices.centred_clipping(gram, radius=self.radius, iterations=self.iterations)
        else:
            coefficient_C = choices.norm_bound(gram, radius=self.radius)
        return coefficient_C if mix_CC is None else coefficient_C @ mix_CC

    def _by_coordinate(self, came: Sequence[Row], whole: Span, out_N: Tensor) -> None:
        """The median or trimmed mean of each number, into ``out_N``."""
        trim = self.liars if self.rule == "trimmed_mean" else (len(came) - 1) // 2
        mix_CC = choices.mixing_CC(gram_CC(came, [whole]), self.liars) if self.mixing else None
        doubles = mix_CC is not None or any(row.numbers.dtype == torch.float64 for row in came)
        for span in stretches([whole], len(came)):
            x_CN = block_CN(came, span, torch.float64 if doubles else torch.float32)
            out_N[span[0] : span[1]] = middle_N(x_CN if mix_CC is None else mix_CC @ x_CN, trim)


def combine(came: Sequence[Row], coefficient_C: Tensor, spans: Sequence[Span], out_N: Tensor) -> None:
    """Write the sum of the rows, each times its coefficient, into these columns of ``out_N``.

    Rows of coefficient 0 are not read.
    """
    some = [(row, float(weight)) for row, weight in zip(came, coefficient_C, strict=True) if weight != 0]
    weights_C = torch.tensor([weight for _, weight in some], dtype=torch.float64)
    for first, last in stretches(spans, len(some)):
        out_N[first:last] = weights_C @ block_CN([row for row, _ in some], (first, last))


def tree_of(x_N: Tensor, layout: Layout) -> Tree:
    """The tensors of a layout whose numbers lie one after the other."""
    parts = torch.split(x_N, [prod(shape) for _, shape in layout])
    return {name: part.view(shape) for (name, shape), part in zip(layout, parts, strict=True)}
