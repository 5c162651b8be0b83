"""What of a message lies under masks: its lifted tensors, its weight and its metrics, as one vector of whole units.

A metric is a sum, such as a loss or a count, and is added like all else: in units of ``2^-24``, rounded once. The
server reads the sum of all clients from the sum of their vectors, and nothing of one client.

Legend: C clients, N numbers of one client's vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import final

import torch
from torch import Tensor

from lichen.core.contracts.server import Aggregator
from lichen.core.errors import LichenError
from lichen.core.expected import ANY, Expected, MetricSpec, TensorSpec, specs_of
from lichen.core.message import Message

__all__ = ["MaskedForm", "form_of"]

METRIC_BITS = 24
"""Bits after the point of a metric."""

_MOST = 2**52
"""Units of a metric, at most: 2,048 clients sum to less than 2^63."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedForm:
    """Which numbers stand where in a vector.

    Attributes:
        group: Of the messages.
        tensors: Lifted tensors, in name order.
        metrics: Metrics, in name order.
    """

    group: str
    tensors: Mapping[str, TensorSpec] = field(default_factory=dict)
    metrics: Mapping[str, MetricSpec] = field(default_factory=dict)

    @property
    def numbers(self) -> int:
        """N."""
        shapes = [*(one.shape for one in self.tensors.values()), *(one.shape for one in self.metrics.values())]
        return sum(prod(shape) for shape in shapes)

    @property
    def summed(self) -> Expected:
        """What the sum is, as the message of those whose it is: sums have no range."""
        metrics = {name: MetricSpec(shape=spec.shape) for name, spec in self.metrics.items()}
        return Expected(group=self.group, tensors=self.tensors, metrics=metrics, weight=(0.0, 0.0))

    def vector(self, lifted: Message) -> Tensor:
        """int64 ``(C, N)`` of a lifted message.

        Raises:
            LichenError: if the message is of another form, or a metric is past its limit.
        """
        clients = len(lifted.client_C)
        if lifted.tensors.keys() != self.tensors.keys() or lifted.metrics.keys() != self.metrics.keys():
            other = (lifted.tensors.keys() ^ self.tensors.keys()) | (lifted.metrics.keys() ^ self.metrics.keys())
            raise LichenError(
                f"a message with or without {min(other)!r} cannot be masked", where="masks", reason="masks"
            )
        parts = [lifted.tensors[name].cpu().reshape(clients, -1) for name in self.tensors]
        for name in self.metrics:
            units = (lifted.metrics[name].detach().cpu().double() * 2.0**METRIC_BITS).round().reshape(clients, -1)
            if units.numel() and not float(units.abs().amax()) < _MOST:
                raise LichenError(
                    f"metric {name!r} is past the limit of what masks hide", where="masks", reason="masks"
                )
            parts.append(units.long())
        return torch.cat(parts, 1) if parts else torch.zeros(clients, 0, dtype=torch.int64)

    def messages(self, units_N: Tensor, client_C: Tensor, version: int) -> list[Message]:
        """The sum as messages of those whose it is: all of it in the first one's, zeros in one of all others.

        Args:
            units_N: int64, the sum of their vectors.
            client_C: Whose.
            version: Of the job.
        """
        first = self._message(units_N, client_C[:1], version)
        return (
            [first, self._message(torch.zeros_like(units_N), client_C[1:], version)] if len(client_C) > 1 else [first]
        )

    def _message(self, units_N: Tensor, client_C: Tensor, version: int) -> Message:
        """The same numbers of each; they lie in memory once."""
        shapes = [*(one.shape for one in self.tensors.values()), *(one.shape for one in self.metrics.values())]
        parts = zip(torch.split(units_N, [prod(shape) for shape in shapes]), shapes, strict=True)
        each = iter([x.view(1, *shape).expand(len(client_C), *shape) for x, shape in parts])
        return Message(
            group=self.group,
            client_C=client_C,
            version_C=torch.full_like(client_C, version),
            tensors={name: next(each) for name in self.tensors},
            weight_C=torch.zeros(len(client_C), dtype=torch.float64),
            metrics={name: next(each).double() * 2.0**-METRIC_BITS for name in self.metrics},
        )


def form_of(expected: Expected, aggregator: Aggregator | None) -> MaskedForm:
    """The form of messages that are declared to be so.

    Args:
        expected: What a message is before it is lifted.
        aggregator: Lifts it; None: nothing but metrics is sent.

    Raises:
        LichenError: if what is sent has no fixed form, or the aggregator needs single messages.
    """
    shapes = [spec.shape for spec in expected.tensors.values()]
    if expected.texts or expected.optional or any(ANY in shape for shape in shapes):
        raise LichenError(
            "texts, optional tensors and open lengths cannot lie under masks", where="masks", reason="masks"
        )
    one = torch.zeros(1, dtype=torch.int64)
    metrics = {name: expected.metrics[name] for name in sorted(expected.metrics)}
    nothing = Message(
        group=expected.group,
        client_C=one,
        version_C=one,
        tensors={name: torch.zeros(1, *spec.shape, dtype=spec.dtype) for name, spec in expected.tensors.items()},
        weight_C=torch.zeros(1, dtype=torch.float64),
        metrics={name: torch.zeros(1, *spec.shape, dtype=torch.float64) for name, spec in metrics.items()},
    )
    if aggregator is None:
        if expected.tensors:
            raise LichenError("tensors need an aggregator that lifts them", where="masks", reason="masks")
        return MaskedForm(group=expected.group, metrics=metrics)
    lifted = aggregator.lift(nothing)
    tensors = specs_of({name: lifted.tensors[name][0] for name in sorted(lifted.tensors)})
    return MaskedForm(group=lifted.group, tensors=tensors, metrics=metrics)
