"""Messages that are weighed and rounded by themselves, so that only integers are left to be added.

    x_k  →  round(w_k x_k 2^scale)

A lifted message is a message of int64 tensors. They have the names and shapes of what is summed, in units
of ``2^-scale``. One more stands beside them, ``lifted/<scale>/<bits>`` ``(C, 2)``: each client's weight in
units of ``2^-30``, and 1 where the client counts, 0 where it does not. Its name tells the grid, which is no
secret. To add is to add every tensor modulo 2^64, so masks over all of them that cancel between clients
cancel in the sum. ``weight_C`` is not a number, as the weight is told nowhere else. Metrics ride along as
they are: whoever masks leaves out those that show what is to be hidden, such as ``count``.

Under masks nobody but the client can see how large its numbers are. So the client looks: it refuses to lift
what reaches ``2^bits`` units. Then n clients sum to less than ``n 2^bits``, and the server, which can count
to n, refuses more than 64 bits hold. A client that lies can wrap the sum, but it could send any number
anyway; to prove a range under masks is a protocol of its own (Bell et al.).

References:
    Keith Bonawitz, Vladimir Ivanov, Ben Kreuter, Antonio Marcedone, H. Brendan McMahan, Sarvar Patel,
    Daniel Ramage, Aaron Segal and Karn Seth. "Practical Secure Aggregation for Privacy-Preserving
    Machine Learning." CCS 2017. https://eprint.iacr.org/2017/281
    James Bell, Adrià Gascón, Tancrède Lepoint, Baiyu Li, Sarah Meiklejohn, Mariana Raykova and Cathie Yun.
    "ACORN: Input Validation for Secure Aggregation." USENIX Security 2023.
    https://eprint.iacr.org/2022/1461

Legend: C clients, N numbers of one client's message.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import NamedTuple, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import LIFTED, Message
from lichen.core.tree import Tree
from lichen.server.sums import fixed_point
from lichen.server.sums.fixed_point import WEIGHT_BITS, FixedSum

__all__ = ["Terms", "add", "lift"]


@final
class Terms(NamedTuple):
    """What is summed of some clients.

    Attributes:
        message: Its tensors are what is summed.
        weight_C: ``(C,)`` float64, finite and not negative, multiples of ``2^-30``: what each client adds
            to the weight. One of weight 0 adds nothing at all.
        factor_C: What its numbers are multiplied by; None: the weight.
    """

    message: Message
    weight_C: Tensor
    factor_C: Tensor | None = None


def _mark(grid: FixedSum) -> str:
    return f"{LIFTED}{grid.scale}/{grid.lift_bits}"


def lift(message: Message, terms: Iterable[Terms], grid: FixedSum) -> Message:
    """The message, lifted; a client of weight 0 sends zeros.

    Args:
        message: Whose ids, versions and metrics stay.
        terms: What is summed of its clients, in their order.
        grid: An empty sum of the kind that the message will be added to.

    Raises:
        LichenError: if a weight or number is not finite, or reaches the limit of the grid.
    """
    parts = [_lifted(part, grid) for part in terms]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return replace(message, tensors=tensors, weight_C=torch.full_like(message.weight_C, torch.nan))


def _lifted(terms: Terms, grid: FixedSum) -> Tree:
    message, weight_C = terms.message, terms.weight_C
    factor_C = weight_C if terms.factor_C is None else terms.factor_C
    fixed_point.check_weights(message, weight_C.tolist())
    counted_C = weight_C > 0
    out: Tree = {}
    for name, x in message.tensors.items():
        ones = -1, *[1] * (x.dim() - 1)
        units = (x.detach().double() * (factor_C * 2.0**grid.scale).to(x.device).view(ones)).round_()
        units = torch.where(counted_C.to(x.device).view(ones), units, 0.0)
        _check_limit(message, name, units, grid)
        out[name] = units.long()
    weight_units_C = weight_C * 2.0**WEIGHT_BITS
    _check_limit(message, "weight", weight_units_C, grid)
    device = next(iter(message.tensors.values())).device if message.tensors else None
    out[_mark(grid)] = torch.stack([weight_units_C.long(), counted_C.long()], 1).to(device)
    return out


def _check_limit(message: Message, name: str, units: Tensor, grid: FixedSum) -> None:
    """Refuse units of ``2^lift_bits`` or more, and what is not finite."""
    if not units.numel():
        return
    top_C = units.abs().flatten(1).amax(1) if units.dim() > 1 else units.abs()
    for client, top in zip(message.client_C.tolist(), top_C.tolist(), strict=True):
        if not top < 2**grid.lift_bits:
            finite = top < float("inf")
            limit = f"{grid.lift_bits} bits at {grid.scale} after the point"
            raise LichenError(
                f"{name!r} is past the limit of {limit}" if finite else f"tensor {name!r} is not finite",
                where=f"message of client {client}",
                fix="clip the messages, or lower the scale" if finite else "lower the client's learning rate",
            )


def add(total: FixedSum, message: Message) -> FixedSum:
    """``total`` plus every client of a lifted message, masked or not: modulo 2^64, without a look at a number.

    Count, weight and sums mean something once all masks have cancelled, and only if the raw messages of
    the same total weigh less than ``2^33``.

    Raises:
        LichenError: if the message was lifted to another grid, is not int64, differs in group, names or
            shapes from those before, or makes more clients than 64 bits hold.
    """
    mark = _mark(total)
    rest = {name: x for name, x in message.tensors.items() if LIFTED not in name}
    if mark not in message.tensors or any(x.dtype != torch.int64 for x in message.tensors.values()):
        raise LichenError(
            f"messages come as {sorted(message.tensors.keys() - rest.keys())}, the sum takes int64 as {mark!r}",
            where="sum",
            fix="let clients and server load the same recipe",
        )
    layout = fixed_point.layout_of(replace(message, tensors=rest))
    if not layout:
        return total
    new = replace(total, group=message.group, layout=layout)
    clients = len(message.tensors[mark])
    units_N = torch.cat([rest[name].reshape(clients, prod(shape)).sum(0) for name, shape in layout])
    weight, count = message.tensors[mark].sum(0).tolist()
    part = replace(
        new,
        units_N=units_N,
        weight=weight,
        count=count,
        lifted=clients,
        bound=clients * (2**total.lift_bits - 1),
    )
    return fixed_point.merge(total, part)
