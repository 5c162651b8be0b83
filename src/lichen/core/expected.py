"""What a client work declares of its message before anything has come: group, names, shapes, dtypes, ranges.

A server admits a message by this declaration, by the job, and by what it knows of the client; never by what another
client has sent. A work makes its declaration from the job alone and looks at no row.

Legend: C clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from lichen.core.tree import Tree

__all__ = ["ANY", "COUNT", "FAILED", "LOSS", "Expected", "MetricSpec", "TensorSpec", "specs_of", "sums_of", "within"]

_MOST = torch.finfo(torch.float32).max
"""Told in place of a number that is none, where nothing bounds it."""

ANY = -1
"""A length in a shape that is the client's own; :attr:`Expected.numbers` bounds it."""


@final
@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a message: its shape without client axis, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def fits(self, x_C: Tensor) -> bool:
        """Whether a stacked tensor is so.

        >>> TensorSpec((2, ANY)).fits(torch.zeros(5, 2, 7)), TensorSpec((2,)).fits(torch.zeros(5, 3))
        (True, False)
        """
        shape = tuple(x_C.shape[1:])
        return (
            x_C.dim() > 0
            and x_C.dtype == self.dtype
            and len(shape) == len(self.shape)
            and all(have == want or want == ANY for have, want in zip(shape, self.shape, strict=True))
        )


@final
@dataclass(frozen=True, slots=True)
class MetricSpec:
    """A metric of a message, float64: its shape without client axis, and the least and most it can be.

    Attributes:
        low: The least.
        high: The most.
        shape: Of one client's.
        per: The range is that of this metric divided by the one of that name, at least 1; empty: of itself.
    """

    low: float = -math.inf
    high: float = math.inf
    shape: tuple[int, ...] = ()
    per: str = ""


COUNT = MetricSpec(0.0)
"""Something counted."""

FAILED = MetricSpec(0.0, 1.0)
"""1 where a client's training came to no finite number."""

LOSS = MetricSpec(0.0, 1e4, per="count")
"""A sum of losses that cannot be negative, of ``count`` rows or tokens: a mean above 10,000 is no number that a
softmax gives."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a message to a job must be.

    Attributes:
        group: Its group.
        tensors: Its tensors, all of them, by name.
        metrics: Its metrics, all of them, by name.
        weight: The least and most that a client can weigh, as far as the work can say.
        texts: Texts of one client at most.
        letters: Letters of all its texts at most.
        numbers: Numbers of one client's tensors at most, where a shape leaves a length open.
        optional: Names of tensors that may be missing.
    """

    group: str
    tensors: Mapping[str, TensorSpec] = field(default_factory=dict)
    metrics: Mapping[str, MetricSpec] = field(default_factory=dict)
    weight: tuple[float, float] = (0.0, math.inf)
    texts: int = 0
    letters: int = 1 << 20
    numbers: int = 1 << 40
    optional: frozenset[str] = frozenset()


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """The specs of tensors without client axis, as they are.

    >>> specs_of({"w": torch.zeros(3)})
    {'w': TensorSpec(shape=(3,), dtype=torch.float32)}
    """
    return {name: TensorSpec(tuple(x.shape), x.dtype) for name, x in tensors.items()}


def sums_of(
    shapes: Mapping[str, tuple[int, ...]], ranges: Mapping[str, MetricSpec] | None = None
) -> dict[str, MetricSpec]:
    """The specs of an objective's sums: those of ``ranges``; of others, ``count`` is counted, the rest any number.

    >>> sums_of({"loss_sum": (), "count": (), "absolute": (2,)}, {"absolute": COUNT})["absolute"]
    MetricSpec(low=0.0, high=inf, shape=(2,), per='')
    """
    known = {"count": COUNT, **(ranges or {})}
    return {name: replace(known.get(name, MetricSpec()), shape=tuple(shape)) for name, shape in shapes.items()}


def within(metrics_C: Mapping[str, Tensor], specs: Mapping[str, MetricSpec]) -> Tree:
    """Metrics that an honest client sends: those in ``specs`` cut to their range.

    A model that has gone astray may lose more than its work can declare, or a number that is none. Its client tells
    the most that it may, so that it is still heard.

    >>> within({"loss_sum": torch.tensor([1.0, torch.nan]), "count": torch.tensor([1.0, 2.0])}, {"loss_sum": LOSS})
    {'loss_sum': tensor([1.0000e+00, 2.0000e+04]), 'count': tensor([1., 2.])}
    """
    out = dict(metrics_C)
    for name, spec in specs.items():
        x_C = out[name]
        per_C = torch.ones_like(x_C)
        if spec.per:
            per_C = per_C * metrics_C[spec.per].clamp(min=1).view(-1, *[1] * (x_C.dim() - 1))
        low_C, high_C = max(spec.low, -_MOST) * per_C, min(spec.high, _MOST) * per_C
        x_C = torch.where(x_C.isfinite() & (x_C <= high_C), x_C, high_C)
        out[name] = torch.where(x_C >= low_C, x_C, low_C)
    return out
