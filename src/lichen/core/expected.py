"""What a client work declares of its message before anything has come: group, names, shapes, dtypes, ranges.

A server admits a message by this declaration, by the job, and by what it knows of the client; never by what another
client has sent. A work makes its declaration from the job alone and looks at no row.

Legend: C clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from lichen.core.message import Message

__all__ = ["ANY", "Expected", "MetricSpec"]

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


def specs_of(tensors: Mapping[str, Tensor], *, stacked: bool = False) -> dict[str, TensorSpec]:
    """The specs of tensors as they are, without their client axis where they are stacked.

    >>> specs_of({"w": torch.zeros(3)})
    {'w': TensorSpec(shape=(3,), dtype=torch.float32)}
    """
    return {name: TensorSpec(tuple(x.shape[1:] if stacked else x.shape), x.dtype) for name, x in tensors.items()}


def expected_of(message: Message) -> Expected:
    """What honest messages like this one are: for works whose message without a row has all of its form.

    Metrics are only asked to be finite.
    """
    return Expected(
        group=message.group,
        tensors=specs_of(message.tensors, stacked=True),
        metrics={name: MetricSpec(shape=tuple(x.shape[1:])) for name, x in message.metrics.items()},
    )
