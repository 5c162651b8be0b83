"""What is wrong with a message, by its form, by what its work declares, and by its numbers.

Legend: C clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lichen.core.expected import ANY, Expected, MetricSpec
from lichen.core.message import Message

__all__ = ["declared_fault", "form_fault", "not_finite_C", "out_of_range_C", "tops_C"]


def form_fault(message: Message) -> tuple[str, str] | None:
    """What is wrong with a message that is to be stacked by client, whatever its work."""
    ids = (("client", message.client_C), ("version", message.version_C), ("weight", message.weight_C))
    count = message.client_C.shape[0] if message.client_C.dim() == 1 else -1
    for name, x in ids:
        if x.dim() != 1 or x.shape[0] != count or count < 1:
            return "form", f"{name}s of shape {tuple(x.shape)} are no list of {max(count, 1)} clients"
        if x.is_complex() or (name != "weight" and x.dtype != torch.int64):
            return "dtype", f"{name}s come as {x.dtype}"
    for kind, tree in (("tensor", message.tensors), ("metric", message.metrics)):
        for name, x in tree.items():
            if x.dim() == 0 or x.shape[0] != count:
                return "form", f"{kind} {name!r} of shape {tuple(x.shape)} is not stacked for {count} clients"
            if x.is_complex():
                return "dtype", f"{kind} {name!r} comes as {x.dtype}"
    if message.texts and len(message.texts) != count:
        return "form", f"texts of {len(message.texts)} clients beside {count}"
    return None


def declared_fault(message: Message, expected: Expected) -> tuple[str, str] | None:
    """What a message has otherwise than its work declares."""
    if message.group != expected.group:
        return "group", f"is of group {message.group!r}, not {expected.group!r}"
    extra, missing = message.tensors.keys() - expected.tensors.keys(), expected.tensors.keys() - message.tensors.keys()
    if extra or missing - expected.optional:
        what = f"brings tensor {min(extra)!r}" if extra else f"lacks tensor {min(missing - expected.optional)!r}"
        return "names", f"{what}, which is not as the job says" if extra else what
    for name, x in message.tensors.items():
        spec = expected.tensors[name]
        if x.dtype != spec.dtype:
            return "dtype", f"tensor {name!r} comes as {x.dtype}, not {spec.dtype}"
        if not spec.fits(x):
            shape = tuple("any" if n == ANY else n for n in spec.shape)
            return "shape", f"tensor {name!r} has shape {tuple(x.shape[1:])}, not {shape}"
    if sum(x[0].numel() for x in message.tensors.values()) > expected.numbers:
        return "shape", f"brings more than {expected.numbers:,} numbers"
    if message.metrics.keys() != expected.metrics.keys():
        other = min(message.metrics.keys() ^ expected.metrics.keys())
        return "names", f"{'brings' if other in message.metrics else 'lacks'} metric {other!r}"
    for name, x in message.metrics.items():
        if x.dtype != torch.float64:
            return "dtype", f"metric {name!r} comes as {x.dtype}"
        if tuple(x.shape[1:]) != expected.metrics[name].shape:
            return "shape", f"metric {name!r} has shape {tuple(x.shape[1:])}, not {expected.metrics[name].shape}"
    for texts in message.texts:
        if len(texts) > expected.texts or sum(map(len, texts)) > expected.letters:
            most = f"{expected.texts:,} texts of {expected.letters:,} letters in all"
            return "texts", f"brings {len(texts):,} texts of {sum(map(len, texts)):,} letters, not {most} at most"
    return None


def not_finite_C(message: Message, weights: Sequence[float], single: Mapping[str, Sequence[float]]) -> list[str]:
    """By client: what of its message is not finite, or nothing."""
    out = [""] * message.client_C.shape[0]
    numbers = [("the weight", weights), *((f"metric {name!r}", values) for name, values in single.items())]
    for name, values in numbers:
        if not all(map(math.isfinite, values)):
            for c, value in enumerate(values):
                out[c] = out[c] or ("" if math.isfinite(value) else name)
    parts = [(f"metric {name!r}", x) for name, x in message.metrics.items() if name not in single]
    parts += [(f"tensor {name!r}", x) for name, x in message.tensors.items()]
    for name, x in parts:
        if not x.is_floating_point() or not x.numel():
            continue
        low_C, high_C = x.detach().reshape(x.shape[0], -1).aminmax(dim=1)  # a number that is none is both
        finite_C = low_C.isfinite() & high_C.isfinite()
        if not bool(finite_C.all()):
            for c in (~finite_C).nonzero().flatten().tolist():
                out[c] = out[c] or name
    return out


def out_of_range_C(
    metrics: Mapping[str, Tensor], single: Mapping[str, Sequence[float]], specs: Mapping[str, MetricSpec], count: int
) -> list[str]:
    """By client: which metric is out of its range, or nothing."""
    out = [""] * count
    for name, spec in specs.items():
        if name not in metrics or (spec.low, spec.high) == (-math.inf, math.inf) or not metrics[name].numel():
            continue
        per_C = [max(value, 1.0) for value in tops_C(metrics[spec.per], count)] if spec.per in metrics else None
        low_C = high_C = single.get(name, ())
        if name not in single:
            ends = metrics[name].reshape(count, -1).aminmax(dim=1)
            low_C, high_C = ends.min.tolist(), ends.max.tolist()
        for c, (low, high) in enumerate(zip(low_C, high_C, strict=True)):
            if per_C is not None:
                low, high = low / per_C[c], high / per_C[c]
            if not (low >= spec.low and high <= spec.high):
                value = low if not low >= spec.low else high
                per = f" of each {spec.per}" if spec.per else ""
                out[c] = out[c] or f"{name} is {value:g}{per}, not {spec.low:g} to {spec.high:g}"
    return out


def tops_C(x_C: Tensor | None, count: int) -> list[float]:
    """The largest number of each client in a metric; nothing is larger than that of one it lacks."""
    if x_C is None or not x_C.numel():
        return [-math.inf] * count
    tops: list[float] = (x_C if x_C.dim() == 1 else x_C.reshape(count, -1).amax(1)).tolist()
    return tops
