"""Holds what single clients sent, one row of numbers a client, in bounded memory.

A total is an immutable collection of rows: client, version, and all its tensors one after the other in name order, as
float64 where one of them is, else as float32. The rows are put in order of client and version when the total is
closed, so that its bytes depend on the set of messages alone. Up to a bound they lie in memory; what is more goes to a
temporary file (:mod:`lichen.server.robust.spill`) and is read back by stretches of columns, a few MiB at a time. Adding
and merging leave older totals as they were: they share rows.

A message of weight 0 is not looked at; all others count 1, since a liar would tell any weight. A message that came late
is multiplied by its discount, and counts 1 nevertheless: a round of late messages makes a shorter step, as with
``Mean(divisor="plain")``.

Legend: C clients, N numbers of one client.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.server.robust.spill import Spill, SpilledRow
from lichen.server.sums.fixed_point import Layout, check_alike, check_weights, layout_of
from lichen.server.sums.summed import weigh_C

__all__ = ["Row", "RowTotal", "Span", "add", "block_CN", "dump", "load", "merge", "ordered", "spans_of", "stretches"]

Span = tuple[int, int]
"""Columns from the first up to the second."""

_LARGEST = 1e140  # the squares of so many numbers still add up in float64
_BLOCK = 2**22  # numbers of all clients that are looked at at once


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """What one client sent.

    Attributes:
        client: Its roster index.
        version: Of the shared tensors it began from.
        numbers: All its numbers, in memory or in a file.
    """

    client: int
    version: int
    numbers: Tensor | SpilledRow

    def part(self, first: int, last: int) -> Tensor:
        """The numbers from ``first`` up to ``last``."""
        return self.numbers[first:last] if isinstance(self.numbers, Tensor) else self.numbers.part(first, last)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowTotal:
    """The rows so far; the value without arguments is the neutral one.

    Attributes:
        memory: Bytes of rows that may lie in memory.
        group: Of the messages; None before the first.
        layout: Names and shapes, without client axis, in name order.
        rows: In the order in which they came.
        resident: Bytes of rows that lie in memory.
        spill: Where more rows go; None while all lie in memory.
    """

    memory: int = 2**30
    group: str | None = None
    layout: Layout = ()
    rows: tuple[Row, ...] = ()
    resident: int = 0
    spill: Spill | None = None


def add(total: RowTotal, message: Message, discount_C: Tensor | None = None) -> RowTotal:
    """``total`` and a row for every client of the message whose weight is above 0.

    Raises:
        LichenError: if a weight, discount or number is not finite, or group, names or shapes differ from
            those before.
    """
    weigh_C(message, "uniform", discount_C)
    weights = message.weight_C.tolist()
    check_weights(message, weights)
    counted = [c for c, weight in enumerate(weights) if weight > 0]
    layout = layout_of(message)
    if not counted or not layout:
        return total
    if total.rows:
        check_alike((total.group, total.layout), (message.group, layout))
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in message.tensors.values()) else torch.float32
    discounts = None if discount_C is None else discount_C.tolist()
    total = replace(total, group=message.group, layout=layout)
    rows = []
    for c in counted:
        x_N = torch.cat([message.tensors[name][c].detach().reshape(-1).to("cpu", dtype) for name, _ in layout])
        if discounts is not None and discounts[c] != 1:
            x_N = (x_N.double() * discounts[c]).to(dtype)
        client = int(message.client_C[c])
        _check_finite(x_N, layout, client)
        rows.append(Row(client=client, version=int(message.version_C[c]), numbers=x_N))
    return _with(total, rows)


def merge(a: RowTotal, b: RowTotal) -> RowTotal:
    """The rows of both.

    Raises:
        LichenError: if group, names or shapes differ.
    """
    if not a.rows or not b.rows:
        return a if a.rows else b
    check_alike((a.group, a.layout), (b.group, b.layout))
    return _with(replace(a, spill=a.spill or b.spill), b.rows)


def _with(total: RowTotal, rows: Sequence[Row]) -> RowTotal:
    """The total and these rows; those that no longer fit into its memory go to the file."""
    resident, spill, more = total.resident, total.spill, []
    for row in rows:
        if isinstance(row.numbers, Tensor):
            if resident + row.numbers.nbytes <= total.memory:
                resident += row.numbers.nbytes
            else:
                spill = spill or Spill()
                row = replace(row, numbers=spill.write(row.numbers))
        more.append(row)
    return replace(total, rows=(*total.rows, *more), resident=resident, spill=spill)


def _check_finite(x_N: Tensor, layout: Layout, client: int) -> None:
    if not x_N.numel() or float(torch.linalg.vector_norm(x_N, float("inf"))) <= _LARGEST:
        return
    sizes = [prod(shape) for _, shape in layout]
    fault = next(
        name
        for (name, _), x in zip(layout, torch.split(x_N, sizes), strict=True)
        if not bool((x.abs() <= _LARGEST).all())
    )
    raise LichenError(
        f"tensor {fault!r} is not finite",
        where=f"message of client {client}",
        fix="leave the client out, or lower its learning rate",
    )


def ordered(total: RowTotal) -> tuple[Row, ...]:
    """The rows in order of client and version.

    Raises:
        LichenError: if there is none, or a client answered one version twice.
    """
    if not total.rows:
        raise LichenError("no client contributed", where="aggregator", fix="invite more clients or skip the round")
    rows = tuple(sorted(total.rows, key=lambda row: (row.client, row.version)))
    for one, other in pairwise(rows):
        if (one.client, one.version) == (other.client, other.version):
            raise LichenError(
                f"client {one.client} answered version {one.version} twice",
                where="aggregator",
                fix="count each once",
            )
    return rows


def spans_of(layout: Layout) -> dict[str, Span]:
    """The columns of each tensor."""
    spans, end = {}, 0
    for name, shape in layout:
        spans[name] = (end, end + prod(shape))
        end += prod(shape)
    return spans


def stretches(spans: Sequence[Span], clients: int) -> Iterator[Span]:
    """The spans in pieces of a few MiB, whose ends follow from the spans and the number of clients alone."""
    step = max(_BLOCK // max(clients, 1), 64)
    for first, last in spans:
        for start in range(first, last, step):
            yield start, min(start + step, last)


def block_CN(rows: Sequence[Row], span: Span, dtype: torch.dtype = torch.float64) -> Tensor:
    """These columns of all rows, in new memory: ``(C, last - first)``."""
    first, last = span
    block = torch.empty(len(rows), last - first, dtype=dtype)
    for row, x_N in zip(rows, block, strict=True):
        x_N.copy_(row.part(first, last))
    return block


def dump(total: RowTotal) -> tuple[Tree, dict[str, Any]]:
    """``(tensors, header)`` that stand for the total; rows of the file are read back into memory."""
    size = sum(prod(shape) for _, shape in total.layout)
    header = {
        "group": total.group,
        "layout": total.layout,
        "answers": [(row.client, row.version) for row in total.rows],
    }
    return {f"row.{k}": row.part(0, size) for k, row in enumerate(total.rows)}, header


def load(tensors: Tree, header: Mapping[str, Any], *, memory: int) -> RowTotal:
    """Undo :func:`dump`.

    Raises:
        LichenError: if these are not rows of one layout.
    """
    try:
        layout = tuple((str(name), tuple(int(n) for n in shape)) for name, shape in header["layout"])
        group = header["group"]
        rows = [
            Row(client=int(client), version=int(version), numbers=tensors[f"row.{k}"])
            for k, (client, version) in enumerate(header["answers"])
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise LichenError(f"these are no rows: {error!r}", where="aggregator", fix="send it again") from None
    size = sum(prod(shape) for _, shape in layout)
    for row in rows:
        x = row.part(0, size)
        if x.shape != (size,) or x.dtype not in (torch.float32, torch.float64):
            what = f"a row of {size} numbers comes as {tuple(x.shape)} {x.dtype}"
            raise LichenError(what, where="aggregator", fix="send it again")
        _check_finite(x, layout, row.client)
    return _with(RowTotal(memory=memory, group=group, layout=layout), rows)
