"""What late answers do to products of factors: nothing where one factor stands, a cross term where both move."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.wire.shared import Shared
from lichen.recipes.schema.read import read_recipe
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from lichen.server.rules import RULES, RuleSettings

A, B = "layer.lora_A", "layer.lora_B"
AGES = (0, 1, 3, 8)


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def walk(both: bool) -> list[Shared]:
    """Tensors of nine versions, which move a little each time; A stands where not both do."""
    a, b, out = numbers(1, 3, 7), numbers(2, 5, 3), []
    for version in range(9):
        out.append(Shared({A: a, B: b}))
        a, b = a + both * 0.1 * numbers(10 + version, 3, 7), b + 0.1 * numbers(30 + version, 5, 3)
    return out


def product(shared: Shared) -> Tensor:
    return shared.trainable[B] @ shared.trainable[A]


def stepped(rule: str, shared: Shared, tensors: dict[str, Tensor], age: int) -> Shared:
    """The server's step by one answer that is so old."""
    message = Message(
        group="",
        client_C=torch.tensor([0]),
        version_C=torch.tensor([0]),
        tensors={name: x[None] for name, x in tensors.items()},
        weight_C=torch.ones(1, dtype=torch.float64),
    )
    aggregator = RULES[rule].make(RuleSettings())
    discount_C = torch.tensor([(1 + age) ** -0.5], dtype=torch.float64)
    change, _ = aggregator.close(aggregator.add(aggregator.zero(), message, discount_C), shared)
    optimizer = ServerSGD()
    return optimizer.update(change, optimizer.init(shared), shared)[0]


@pytest.mark.parametrize("age", AGES)
def test_where_a_stands_a_late_change_moves_the_product_as_it_did_at_its_client(age: int) -> None:
    path, change = walk(both=False), {B: 0.1 * numbers(5, 5, 3)}
    exact = change[B] @ path[0].trainable[A]
    got = product(stepped("ffa", path[age], change, age)) - product(path[age])
    assert torch.allclose(got, exact, atol=1e-10)


@pytest.mark.parametrize("age", AGES)
def test_where_both_move_it_is_off_by_the_cross_terms_and_nothing_else(age: int) -> None:
    path, change = walk(both=True), {A: 0.1 * numbers(4, 3, 7), B: 0.1 * numbers(5, 5, 3)}
    begun, later = path[0].trainable, path[age].trainable
    exact = (begun[B] + change[B]) @ (begun[A] + change[A]) - begun[B] @ begun[A]
    cross = change[B] @ (later[A] - begun[A]) + (later[B] - begun[B]) @ change[A]
    got = product(stepped("fedit", path[age], change, age)) - product(path[age])
    assert torch.allclose(got, exact + cross, atol=1e-10)
    assert (float(cross.norm()) > 0.01 * float(exact.norm())) == (age > 0)


def test_a_sum_of_late_changes_of_b_is_the_exact_sum_of_products() -> None:
    """Several ages in one step: the discounted mean of products, by an oracle that never adds factors."""
    path, mean = walk(both=False), Mean()
    total, weights, wanted = mean.zero(), 0.0, torch.zeros(5, 7, dtype=torch.float64)
    for client, age in enumerate(AGES):
        change, weight = 0.1 * numbers(50 + client, 5, 3), float(1 + client)
        message = Message(
            group="",
            client_C=torch.tensor([client]),
            version_C=torch.tensor([8 - age]),
            tensors={B: change[None]},
            weight_C=torch.tensor([weight], dtype=torch.float64),
        )
        discount = (1 + age) ** -0.5
        total = mean.add(total, message, torch.tensor([discount], dtype=torch.float64))
        wanted += weight * discount * (change @ path[8 - age].trainable[A])
        weights += weight * discount
    change, _ = mean.close(total, path[8])
    assert torch.allclose(change.trainable[B] @ path[8].trainable[A], wanted / weights, atol=1e-6)


BASE = (
    "federation.clients_per_round=null",
    "federation.schedule={kind: buffered, arrivals: 2}",
    "engine.clock={median: 60}",
)


@pytest.mark.parametrize("rule", RULES)
def test_which_rules_may_be_buffered(rule: str) -> None:
    words = (*BASE, f"federation.aggregate={rule}")
    if rule in ("mean", "ffa", "fedit"):
        assert read_recipe("chat-lora", words).federation.schedule.kind == "buffered"
        return
    with pytest.raises(LichenError, match="older tensors") as caught:
        read_recipe("chat-lora", words)
    assert caught.value.where == "federation.schedule.kind"
