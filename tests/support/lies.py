"""What a client may answer instead of the truth: each lie makes of an honest message what comes in its place.

The honest message is one client's (C = 1), made for version 3 of a job over clients 0 to 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lichen.core.message import Message

__all__ = ["HEAVY", "LIES", "Lie"]

Lie = Callable[[Message], list[Message]]

HEAVY = frozenset({"20 MB of text", "a million texts", "a million clients without tensors"})
"""Lies that are too large to be told to every aggregator."""


def _tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Lie:
    return lambda message: [replace(message, tensors=change(dict(message.tensors)))]


def _first(change: Callable[[Tensor], Tensor]) -> Lie:
    """Change the first tensor."""

    def lie(message: Message) -> list[Message]:
        name = min(message.tensors)
        return [replace(message, tensors={**message.tensors, name: change(message.tensors[name])})]

    return lie


def _one_number(value: float) -> Lie:
    def change(x_C: Tensor) -> Tensor:
        x_C = x_C.float() if not x_C.is_floating_point() else x_C.clone()
        x_C.view(-1)[-1] = value
        return x_C

    return _first(change)


def _weight(weight: float) -> Lie:
    return lambda message: [replace(message, weight_C=torch.tensor([weight], dtype=torch.float64))]


def _metric(name: str, value: float) -> Lie:
    one = torch.tensor([value], dtype=torch.float64)
    return lambda message: [replace(message, metrics={**message.metrics, name: one})]


def _client(client: int) -> Lie:
    return lambda message: [replace(message, client_C=torch.tensor([client]))]


def _version(version: int) -> Lie:
    return lambda message: [replace(message, version_C=torch.tensor([version]))]


def _many(message: Message) -> list[Message]:
    count = 10**6
    return [
        replace(
            message,
            client_C=torch.arange(count),
            version_C=message.version_C.expand(count).clone(),
            weight_C=torch.ones(count, dtype=torch.float64),
            tensors={},
            metrics={},
        )
    ]


LIES: dict[str, Lie] = {
    "a client who does not exist": _client(999),
    "the name of another client": lambda m: [replace(m, client_C=(m.client_C + 1) % 4)],
    "a client of a number below 0": _client(-1),
    "twice": lambda m: [m, m],
    "a thousand times": lambda m: [m] * 1000,
    "version -7": _version(-7),
    "a version to come": lambda m: [replace(m, version_C=m.version_C + 1)],
    "a version of long ago": lambda m: [replace(m, version_C=m.version_C - 2)],
    "version 2^62": _version(2**62),
    "a weight below 0": _weight(-1.0),
    "no number as weight": _weight(float("nan")),
    "a weight without end": _weight(float("inf")),
    "a weight of a million": _weight(1e6),
    "a thousandfold weight": lambda m: [replace(m, weight_C=m.weight_C * 1000)],
    "a tensor too many": _tensors(lambda t: {**t, "zzz": torch.ones(1, 2)}),
    "a patch of the base": _tensors(lambda t: {**t, "patch.layer.dense": torch.ones(1, 2, 2)}),
    "a teacher's answers": _tensors(lambda t: {**t, "answers.prob": torch.ones(1, 2, 2)}),
    "a tensor too few": _tensors(lambda t: {name: t[name] for name in sorted(t)[1:]}),
    "no tensors": _tensors(lambda t: {}),
    "another name": _tensors(lambda t: {f"x{name}": x for name, x in t.items()}),
    "one number too many": _first(lambda x: torch.cat([x, x[..., :1]], -1)),
    "one dimension too many": _first(lambda x: x.unsqueeze(-1)),
    "an empty tensor": _first(lambda x: x[..., :0]),
    "no client axis": _first(lambda x: x.flatten()[0]),
    "the tensor of two clients": _first(lambda x: torch.cat([x, x])),
    "float64": _first(lambda x: x.double() if x.dtype != torch.float64 else x.float()),
    "bool": _first(lambda x: x != 0),
    "complex numbers": _first(lambda x: torch.complex(x.float(), x.float())),
    "another group": lambda m: [replace(m, group="another")],
    "no group": lambda m: [replace(m, group="")],
    "NaN in a tensor": _one_number(float("nan")),
    "infinity in a tensor": _one_number(float("inf")),
    "minus infinity in a tensor": _one_number(float("-inf")),
    "no metrics": lambda m: [replace(m, metrics={})],
    "a metric too many": _metric("zzz", 1.0),
    "failed a billion times": _metric("failed", 1e9),
    "failed less than never": _metric("failed", -1.0),
    "NaN tokens": _metric("tokens", float("nan")),
    "more tokens than it has": _metric("tokens", 1e12),
    "fewer rows than none": _metric("count", -4.0),
    "a loss of a billion": _metric("loss_sum", 1e9),
    "a loss of minus a billion": _metric("loss_sum", -1e9),
    "NaN loss": _metric("loss_sum", float("nan")),
    "a metric of two numbers": lambda m: [replace(m, metrics={**m.metrics, "count": torch.ones(1, 2).double()})],
    "a metric of whole numbers": lambda m: [replace(m, metrics={**m.metrics, "count": torch.ones(1).long()})],
    "20 MB of text": lambda m: [replace(m, texts=(("x" * (20 << 20),),))],
    "a million texts": lambda m: [replace(m, texts=(("x",) * 10**6,))],
    "a million clients without tensors": _many,
    "two weights": lambda m: [replace(m, weight_C=torch.ones(2, dtype=torch.float64))],
    "two versions": lambda m: [replace(m, version_C=m.version_C.repeat(2))],
}
"""Every lie by its name."""
