"""The laws of every aggregator, for :mod:`lichen.fl.testing`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from lichen.core.contracts.server import Aggregator
from lichen.core.errors import LichenError
from lichen.core.message import Message, concatenate_messages, pack_message, take_client, unpack_message
from lichen.core.tree import digest, plain
from lichen.core.wire.shared import Shared

__all__ = ["LAWS", "check_aggregator", "hold"]

Law = Callable[[Aggregator, Message, Shared, int], None]


def check_aggregator(aggregator: Aggregator, message: Message, shared: Shared, *, seed: int = 0) -> None:
    """Hold an aggregator to every law of :data:`LAWS`, and let it refuse a round to which nobody came.

    Args:
        aggregator: The member.
        message: What several clients might send, three at least; the first of them has a weight above 0.
        shared: The server's tensors.
        seed: Of the orders that are tried.

    Raises:
        AssertionError: naming the law that is broken.
    """
    for law in LAWS.values():
        law(aggregator, message, shared, seed)
    _refused(
        lambda: aggregator.close(aggregator.zero(), shared),
        "close must raise a LichenError where nothing was folded in",
    )


def hold(holds: bool, law: str) -> None:
    """Say which law is broken, if one is."""
    if not holds:
        raise AssertionError(law)


def _closed(aggregator: Aggregator, total: Any, shared: Shared) -> tuple[str, dict[str, float]]:
    change, metrics = aggregator.close(total, shared)
    return digest(change.flat()), metrics


def _one(aggregator: Aggregator, message: Message) -> Any:
    return aggregator.add(aggregator.zero(), message)


def order(aggregator: Aggregator, message: Message, shared: Shared, seed: int) -> None:
    """Any order, blocks and merging give the same bytes."""
    clients, g = len(message.client_C), torch.Generator().manual_seed(seed)
    positions = torch.randperm(clients, generator=g).tolist()
    cuts = sorted({0, clients, *torch.randint(0, clients, (3,), generator=g).tolist()})
    folded, merged = aggregator.zero(), aggregator.zero()
    for block in [[take_client(message, k) for k in positions[a:b]] for a, b in pairwise(cuts)]:
        folded = aggregator.add(folded, concatenate_messages(block))
        part = aggregator.zero()
        for one in block:
            part = aggregator.add(part, one)
        merged = aggregator.merge(part, merged)
    whole = _closed(aggregator, _one(aggregator, message), shared)
    hold(_closed(aggregator, folded, shared) == whole, "blocks in another order give the same bytes")
    hold(_closed(aggregator, merged, shared) == whole, "totals that were merged give the same bytes")


def monoid(aggregator: Aggregator, message: Message, shared: Shared, seed: int) -> None:
    """``merge`` is associative, and ``zero`` is its neutral element."""
    del seed
    parts = [_one(aggregator, take_client(message, k)) for k in range(min(3, len(message.client_C)))]
    a, b, c = parts[0], parts[-1], parts[len(parts) // 2]
    left = aggregator.merge(aggregator.merge(a, b), c)
    right = aggregator.merge(a, aggregator.merge(b, c))
    hold(_closed(aggregator, left, shared) == _closed(aggregator, right, shared), "merge is associative")
    one_by_one = _closed(aggregator, a, shared)
    for both in (aggregator.merge(a, aggregator.zero()), aggregator.merge(aggregator.zero(), a)):
        hold(_closed(aggregator, both, shared) == one_by_one, "zero changes nothing")


def pure(aggregator: Aggregator, message: Message, shared: Shared, seed: int) -> None:
    """Folding in changes neither the total that there was nor the message."""
    del seed
    before = digest(message.tensors)
    total = _one(aggregator, take_client(message, 0))
    first = _closed(aggregator, total, shared)
    rest = concatenate_messages([take_client(message, k) for k in range(1, len(message.client_C))])
    aggregator.add(total, rest)
    aggregator.merge(_one(aggregator, rest), total)
    aggregator.merge(total, _one(aggregator, rest))
    hold(_closed(aggregator, total, shared) == first, "add and merge leave the total that there was as it is")
    hold(digest(message.tensors) == before, "add leaves the message as it is")


def weight_zero(aggregator: Aggregator, message: Message, shared: Shared, seed: int) -> None:
    """A client of weight 0 might as well have stayed away, whatever it sent."""
    del seed
    clients = len(message.client_C)
    weight_C, tensors = message.weight_C.clone(), {name: x_C.clone() for name, x_C in message.tensors.items()}
    weight_C[-1] = 0.0
    for x_C in tensors.values():
        x_C[-1] = torch.nan if x_C.is_floating_point() else torch.iinfo(x_C.dtype).min
    there = replace(message, weight_C=weight_C, tensors=tensors)
    without = concatenate_messages([take_client(there, k) for k in range(clients - 1)])
    same = _closed(aggregator, _one(aggregator, there), shared) == _closed(
        aggregator, _one(aggregator, without), shared
    )
    hold(same, "a client of weight 0 counts for nothing, even if it sent no numbers")


def crossing(aggregator: Aggregator, message: Message, shared: Shared, seed: int) -> None:
    """A total that went through ``dump``, bytes and ``load`` merges and closes to the same bytes."""
    clients = len(message.client_C)
    cut = seed % (clients + 1)
    here, there = aggregator.zero(), aggregator.zero()
    for k in range(clients):
        if k < cut:
            here = aggregator.add(here, take_client(message, k))
        else:
            there = aggregator.add(there, take_client(message, k))
    tensors, header = aggregator.dump(here)
    crossed = aggregator.load(load(save(plain(tensors))), json.loads(json.dumps(header)))
    whole = _closed(aggregator, _one(aggregator, message), shared)
    merged = _closed(aggregator, aggregator.merge(crossed, there), shared)
    hold(merged == whole, "a total that was dumped and loaded merges to the same bytes")
    if cut:
        same = _closed(aggregator, crossed, shared) == _closed(aggregator, here, shared)
        hold(same, "a total that was dumped and loaded closes to the same bytes")


def clients(aggregator: Aggregator, message: Message, shared: Shared, seed: int) -> None:
    """``clients`` counts those of a weight above 0, and nobody where nothing was folded in."""
    del shared, seed
    hold(aggregator.clients(aggregator.zero()) == 0, "nobody counts before the first message")
    seen = aggregator.clients(_one(aggregator, message))
    hold(seen == int((message.weight_C > 0).sum()), "clients counts those of a weight above 0")


def discount(aggregator: Aggregator, message: Message, shared: Shared, seed: int) -> None:
    """A discount of 1 is none, and discounts belong to the clients: any order and blocks give the same bytes."""
    clients, g = len(message.client_C), torch.Generator().manual_seed(seed)
    ones_C = torch.ones(clients, dtype=torch.float64)
    undiscounted = _closed(aggregator, aggregator.add(aggregator.zero(), message, ones_C), shared)
    hold(undiscounted == _closed(aggregator, _one(aggregator, message), shared), "a discount of 1 changes nothing")
    age_C = torch.randint(0, 9, (clients,), generator=g)
    discount_C = (1 + age_C.double()).rsqrt()
    whole = _closed(aggregator, aggregator.add(aggregator.zero(), message, discount_C), shared)
    folded, merged = aggregator.zero(), aggregator.zero()
    for k in reversed(range(clients)):
        one, its_C = take_client(message, k), discount_C[k : k + 1]
        folded = aggregator.add(folded, one, its_C)
        merged = aggregator.merge(merged, aggregator.add(aggregator.zero(), one, its_C))
    hold(_closed(aggregator, folded, shared) == whole, "discounted blocks in another order give the same bytes")
    hold(_closed(aggregator, merged, shared) == whole, "discounted totals that were merged give the same bytes")


def lifting(aggregator: Aggregator, message: Message, shared: Shared, seed: int) -> None:
    """What needs a sum gives the same bytes from lifted messages, also under masks; what does not refuses to lift."""
    hold(aggregator.needs in ("sum", "single"), "needs is sum or single")
    if aggregator.needs == "single":
        _refused(lambda: aggregator.lift(message), "what needs single messages lifts none")
        return
    clients, g = len(message.client_C), torch.Generator().manual_seed(seed)
    discount_C = torch.rand(clients, generator=g, dtype=torch.float64) / 2 + 0.5
    for factor_C in (None, discount_C):
        lifted = unpack_message(pack_message(aggregator.lift(message, factor_C)))
        integers = all(x_C.dtype == torch.int64 for x_C in lifted.tensors.values())
        hold(integers and bool(lifted.weight_C.isnan().all()), "a lifted message is int64, and tells no weight")
        raw = _closed(aggregator, aggregator.add(aggregator.zero(), message, factor_C), shared)
        hold(_closed(aggregator, _one(aggregator, lifted), shared) == raw, "a lifted message adds to the same bytes")
        masked = replace(lifted, tensors={name: x_C + _masks(x_C, g) for name, x_C in lifted.tensors.items()})
        total, merged = aggregator.zero(), aggregator.zero()
        for k in torch.randperm(clients, generator=g).tolist():
            total = aggregator.add(total, take_client(masked, k))
            merged = aggregator.merge(_one(aggregator, take_client(masked, k)), merged)
        tensors, header = aggregator.dump(merged)
        merged = aggregator.load(load(save(plain(tensors))), json.loads(json.dumps(header)))
        hold(_closed(aggregator, total, shared) == raw, "masks over lifted messages cancel in the sum")
        hold(_closed(aggregator, merged, shared) == raw, "masks cancel in totals that cross and merge")
    alone = aggregator.lift(take_client(message, 0))
    same = digest(alone.tensors) == digest(take_client(aggregator.lift(message), 0).tensors)
    hold(same, "a client lifts alone what it lifts beside others")
    _refused(lambda: aggregator.add(aggregator.zero(), lifted, discount_C), "a lifted message is discounted already")


def _masks(x_C: Tensor, g: torch.Generator) -> Tensor:
    """Random over all 64 bits; they sum to 0 over the clients."""
    masks_C = torch.randint(-(2**63), 2**63 - 1, x_C.shape, generator=g)
    masks_C[-1] -= masks_C.sum(0)
    return masks_C


def _refused(call: Callable[[], object], law: str) -> None:
    try:
        call()
    except LichenError:
        return
    raise AssertionError(law)


LAWS: Mapping[str, Law] = {
    "order": order,
    "monoid": monoid,
    "pure": pure,
    "weight_zero": weight_zero,
    "crossing": crossing,
    "clients": clients,
    "discount": discount,
    "lifting": lifting,
}
"""Every law of an aggregator, by name; each takes the aggregator, a message, the shared tensors and a seed."""
