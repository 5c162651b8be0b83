"""An aggregation rule in one file: the median of every coordinate, which single outliers cannot move.

    Dong Yin, Yudong Chen, Kannan Ramchandran and Peter Bartlett. "Byzantine-Robust Distributed Learning: Towards
    Optimal Statistical Rates." ICML 2018. https://arxiv.org/abs/1803.01498

A package that brings it names it by an entry point, and a recipe by ``federation.aggregate: median``::

    [project.entry-points."lichen.aggregators"]
    median = "median:RULE"
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.declared import Paper, Property
from lichen.server.rules import AggregationRule
from lichen.server.single import SingleMessages


@final
@dataclass(frozen=True, slots=True)
class Median(SingleMessages):
    """The coordinate-wise median (the lower one of two); every client of weight above 0 counts once."""

    one_version = False

    def zero(self) -> Tree:
        """No message yet."""
        return {}

    def add(self, total: Tree, message: Message, discount_C: Tensor | None = None) -> Tree:
        """The messages so far, and those of these clients; a discount keeps out whoever it sets to 0."""
        counted_C = message.weight_C * (1 if discount_C is None else discount_C) > 0
        return self.merge(total, {name: x_C[counted_C] for name, x_C in message.tensors.items()})

    def clients(self, total: Tree) -> int:
        """How many clients there were."""
        return max((len(x_C) for x_C in total.values()), default=0)

    def merge(self, a: Tree, b: Tree) -> Tree:
        """The messages of both."""
        return {name: torch.cat([a[name], b[name]]) for name in a} if a and b else a or b

    def close(self, total: Tree, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """The median of each number, and how many clients there were."""
        if not self.clients(total):
            raise LichenError("no client contributed", where="aggregator.median", fix="invite more clients")
        median = {name: x_C.median(0).values for name, x_C in total.items()}
        return Shared(median), {"clients": float(self.clients(total))}

    def dump(self, total: Tree) -> tuple[Tree, dict[str, Any]]:
        """What crosses between processes."""
        return total, {}

    def load(self, tensors: Tree, header: Mapping[str, Any]) -> Tree:
        """Undo :meth:`dump`."""
        return tensors


RULE = AggregationRule(
    name="median",
    summary="the median of every coordinate",
    make=lambda settings: Median(),
    papers=(Paper(short="Yin et al. ICML 2018", url="https://arxiv.org/abs/1803.01498"),),
    allows=frozenset({Property.SERVER_STEP, Property.ONE_LAYOUT}),
)
