"""Means over clients of unequal ranks and layers against one client at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree, digest
from lichen.server.lowrank.groups import GroupSums
from lichen.server.lowrank.lowrank import FedEx, FedIT, groups
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from support.dense_adapters import (
    EQUAL,
    LAYERS,
    UNEQUAL,
    Client,
    answers,
    close,
    error,
    fold,
    held,
    mean_product,
    own,
    patch,
    senders,
    start,
)
from support.flat import closed, updated


def padded_mean(shared: Tree, messages: Sequence[Message], layer: str, half: Any) -> Any:
    total = torch.zeros_like(shared[f"{layer}.lora_{half}"].double())
    for p, message in senders(messages, layer):
        B, A = own(shared, message, layer)
        if half == "A":
            total[: A.shape[0]] += p * A
        else:
            total[:, : B.shape[1]] += p * B
    return total


@pytest.mark.parametrize("clients", [EQUAL, UNEQUAL, UNEQUAL[1:]])
def test_fedit_is_the_mean_of_zero_padded_halves_over_those_who_sent_them(clients: int) -> None:
    shared = start(torch.float64)
    messages = answers(shared, clients)
    change, metrics = close(FedIT(), messages, shared)
    lost = kept = 0.0
    for layer in LAYERS:
        means = {half: padded_mean(shared, messages, layer, half) for half in "AB"}
        for half, mean in means.items():
            name = f"{layer}.lora_{half}"
            torch.testing.assert_close(shared[name] + change[name], mean, rtol=1e-10, atol=1e-10)
        ideal = mean_product(shared, messages, layer)
        lost += float((ideal - means["B"] @ means["A"]).square().sum())
        kept += float(ideal.square().sum())
    assert metrics["deviation"] == pytest.approx((lost / kept) ** 0.5, rel=1e-8)
    assert metrics["clients"] == len(clients)
    assert metrics["weight"] == sum(client.weight for client in clients)
    whole = sum(client.weight * m.tensors["head.weight"][0] for client, m in zip(clients, messages, strict=True))
    torch.testing.assert_close(change["head.weight"], whole / metrics["weight"], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("clients", [UNEQUAL, UNEQUAL[1:], UNEQUAL * 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_fedex_is_exact_for_unequal_ranks_and_layers(clients: int, dtype: torch.dtype, tolerance: float) -> None:
    scaling, shared = 1.7, start(dtype)
    for t in range(3):
        messages = answers(shared, clients, seed=t)
        before = {layer: patch(shared, layer) for layer in LAYERS}
        change, _ = close(FedEx(scaling), messages, shared)
        new, _ = updated(ServerSGD(), change, {}, shared)
        for layer in LAYERS:
            ideal = before[layer] + scaling * mean_product(shared, messages, layer)
            assert error(held(new, layer, scaling), ideal) < tolerance
        shared = new


@pytest.mark.parametrize("aggregator", [Mean(), FedIT(), FedEx(2.0)])
@pytest.mark.parametrize("halves", ["A", "B", ""])
def test_a_name_that_nobody_sent_stays_as_it_is(aggregator: Any, halves: Any) -> None:
    shared = start(torch.float32)
    messages = answers(shared, EQUAL, halves=halves)
    change, metrics = close(aggregator, messages, shared)
    assert change.keys() == messages[0].tensors.keys()
    new, _ = updated(ServerSGD(), change, {}, shared)
    for name, x in shared.items():
        assert torch.equal(new[name], x) == (name not in change)
    assert metrics.get("deviation", 0.0) < 1e-7


@pytest.mark.parametrize("halves", ["A", "B"])
def test_one_half_of_unequal_ranks_is_averaged_without_loss(halves: Any) -> None:
    shared = start(torch.float64)
    messages = answers(shared, UNEQUAL, halves=halves)
    change, metrics = close(FedIT(), messages, shared)
    new, _ = updated(ServerSGD(), change, {}, shared)
    for layer in LAYERS:
        product = new[f"{layer}.lora_B"] @ new[f"{layer}.lora_A"]
        assert error(product, mean_product(shared, messages, layer)) < 1e-10
    assert metrics["deviation"] < 1e-9


def test_a_layer_that_nobody_sent_stays_as_it_is() -> None:
    shared = start(torch.float32)
    messages = answers(shared, [client._replace(without=("low",)) for client in EQUAL])
    change, _ = close(FedEx(2.0), messages, shared)
    assert not any("low." in name for name in change)
    assert any("tall." in name for name in change)


def test_equal_clients_in_several_groups_give_the_bytes_of_one() -> None:
    shared = start(torch.float32)
    messages = answers(shared, EQUAL)
    one = fold(FedIT(), messages)
    several = fold(FedIT(), [replace(m, group=f"g{k}") for k, m in enumerate(messages)])
    assert len(several.sums.sums) == 3
    assert digest(closed(FedIT(), one, shared)[0]) == digest(closed(FedIT(), several, shared)[0])
    assert groups.weight_of(several.sums, "low.lora_A") == groups.weight_of(one.sums, "low.lora_A")


def test_names_the_server_lacks_take_the_largest_rank_that_came() -> None:
    shared = start(torch.float64)
    total = GroupSums()
    for message in answers(shared, [Client(1.0, 1), Client(3.0, 3)]):
        total = groups.add(total, message, message.weight_C)
    found = groups.means(total, {})["low.lora_A"]
    assert found.padded.shape == (3, 40)
    assert found.share_r.tolist() == [1.0, 0.75, 0.75]


def test_refuses_what_does_not_fit() -> None:
    shared = start(torch.float32)
    messages = answers(shared, UNEQUAL)
    small = {n: x[:1] if n.endswith("lora_A") else x for n, x in shared.items()}
    with pytest.raises(LichenError, match="the model's is"):
        close(FedIT(), messages, small)
    wide = {**messages[0].tensors, "head.weight": torch.ones(1, 5, 3)}
    with pytest.raises(LichenError, match=r"head\.weight"):
        close(FedIT(), [messages[1], replace(messages[0], tensors=wide)], shared)
    some = {n: x for n, x in messages[0].tensors.items() if n != "low.lora_B"}
    with pytest.raises(LichenError, match=r"different halves of layer 'low'"):
        close(FedIT(), [messages[1], replace(messages[0], tensors=some)], shared)
    odd = {**messages[0].tensors, "low.lora_A": messages[0].tensors["low.lora_A"][:, :2]}
    with pytest.raises(LichenError, match="halves of layer 'low' come as"):
        close(FedIT(), [replace(messages[0], tensors=odd)], shared)
    with pytest.raises(LichenError, match="scales"):
        groups.merge(GroupSums(), GroupSums(scale=20))
    with pytest.raises(LichenError, match="not sums"):
        groups.load({}, {"scale": 40, "sums": [{}]})


def test_the_parts_of_a_sum_share_one_room() -> None:
    shared = start(torch.float64, layers={"low": (9, 40, 2)})
    near = answers(shared, [Client(1.0, 1), Client(1.0, 2)])
    for message in near:
        message.tensors["low.lora_A"][:] = 2.0**22 * 1.2
    first = fold(FedIT(), near[:1])
    with pytest.raises(LichenError, match="64-bit range"):
        FedIT().add(first, near[1])
    with pytest.raises(LichenError, match="64-bit range"):
        FedIT().merge(first, fold(FedIT(), near[1:]))
    assert closed(FedIT(), first, shared)[1]["clients"] == 1
