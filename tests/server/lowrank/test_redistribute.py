"""FlexLoRA and FLoRIST against the singular value decomposition of the dense mean product.

Legend: m rows, n columns, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.server.lowrank.lowrank import FedIT
from lichen.server.lowrank.redistribute import FlexLoRA, FLoRIST, fewest
from lichen.server.optimize import ServerSGD
from support.dense_adapters import EQUAL, LAYERS, UNEQUAL, Client, answers, close, error, held, mean_product, start
from support.flat import updated


def step(aggregator: Any, messages: Sequence[Message], shared: Tree) -> Any:
    change, metrics = close(aggregator, messages, shared)
    return updated(ServerSGD(), change, {}, shared)[0], metrics


@pytest.mark.parametrize("clients", [EQUAL, UNEQUAL, UNEQUAL[1:], UNEQUAL * 8])
def test_truncation_is_the_best_of_its_rank(clients: int) -> None:
    shared = start(torch.float64)
    messages = answers(shared, clients)
    new, metrics = step(FlexLoRA(), messages, shared)
    cut = size = 0.0
    ranks = []
    for layer, (_, _, r) in LAYERS.items():
        dense = mean_product(shared, messages, layer)
        U, sigma, V = torch.linalg.svd(dense, full_matrices=False)
        best = (U[:, :r] * sigma[:r]) @ V[:r]
        assert error(held(new, layer), best) < 1e-10
        cut, size = cut + float(sigma[r:].square().sum()), size + float(sigma.square().sum())
        B, A = new[f"{layer}.lora_B"], new[f"{layer}.lora_A"]
        # Balanced and in order: both halves have orthogonal directions of length √σ.
        keep = min(r, int(torch.linalg.matrix_rank(dense)))
        ranks.append(keep)
        torch.testing.assert_close(B.T @ B, torch.diag(sigma[:r]), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(A[:keep] @ A[:keep].T, torch.diag(sigma[:keep]), rtol=1e-8, atol=1e-9)
    assert metrics["lost"] == pytest.approx((cut / size) ** 0.5, rel=1e-9)
    assert metrics["rank"] == sum(ranks) / 3
    assert metrics["deviation"] == pytest.approx(close(FedIT(), messages, shared)[1]["deviation"], rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("b", [0.0, 0.05])
def test_exact_where_the_rank_is_enough(dtype: torch.dtype, tolerance: float, b: Any) -> None:
    shared = start(dtype, layers={"low": (9, 40, 8), "large": (60, 90, 8)}, b=b)
    # A first round at a low rate: A is far larger than what becomes of it.
    messages = answers(shared, [Client(1.0, 4), Client(3.0, 2), Client(0.5, 2)], scale=1e-3)
    new, metrics = step(FlexLoRA(), messages, shared)
    for layer in ("low", "large"):
        assert error(held(new, layer), mean_product(shared, messages, layer)) < tolerance
    assert metrics["lost"] < tolerance


def test_a_client_of_lower_rank_finds_the_best_of_that_rank_in_front() -> None:
    shared = start(torch.float64)
    messages = answers(shared, EQUAL)
    new, _ = step(FlexLoRA(), messages, shared)
    U, sigma, V = torch.linalg.svd(mean_product(shared, messages, "large"), full_matrices=False)
    front = new["large.lora_B"][:, :2] @ new["large.lora_A"][:2]
    assert error(front, (U[:, :2] * sigma[:2]) @ V[:2]) < 1e-10


@pytest.mark.parametrize("energy", [0.3, 0.8, 1.0])
def test_the_fewest_directions_with_the_energy_and_fresh_rows_for_the_rest(energy: Any) -> None:
    shared = start(torch.float64)
    messages = answers(shared, UNEQUAL)
    new, metrics = step(FLoRIST(energy), messages, shared)
    ranks = []
    for layer, (_, n, r) in LAYERS.items():
        U, sigma, V = torch.linalg.svd(mean_product(shared, messages, layer), full_matrices=False)
        held_share = sigma.square().cumsum(0) / sigma.square().sum()
        keep = min(r, int((held_share < energy - 1e-12).sum()) + 1)
        ranks.append(keep)
        assert error(held(new, layer), (U[:, :keep] * sigma[:keep]) @ V[:keep]) < 1e-10
        assert not new[f"{layer}.lora_B"][:, keep:].any()
        fresh = new[f"{layer}.lora_A"][keep:]
        assert fresh.abs().max() <= n**-0.5 if keep < r else not fresh.numel()
        assert (fresh.norm(dim=1) > 0.2).all()
    assert metrics["rank"] == sum(ranks) / 3
    assert min(ranks) < 4 or energy == 1.0


def test_directions_that_carry_nothing_can_still_learn() -> None:
    shared = start(torch.float32, b=0.0)
    new, metrics = step(FlexLoRA(), answers(shared, [Client(1.0, 2), Client(4.0, 1)]), shared)
    assert metrics["rank"] == 3
    for layer in LAYERS:
        assert not new[f"{layer}.lora_B"][:, 3].any()
        assert float(new[f"{layer}.lora_A"][3].norm()) > 0.2


@given(
    values=st.lists(st.floats(0, 100), min_size=1, max_size=8),
    energy=st.floats(0.01, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_fewest_is_enough_and_one_less_is_not(values: Any, energy: Any) -> None:
    sigma = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    keep, square = fewest(sigma, energy), sigma.square()
    total = float(square.sum())
    assert float(square[:keep].sum()) >= energy * total * (1 - 1e-12)
    if keep:
        assert float(square[: keep - 1].sum()) < energy * total * (1 + 1e-12)


@pytest.mark.parametrize("halves", ["A", "B"])
def test_one_half_that_was_sent_is_enough(halves: Any) -> None:
    shared = start(torch.float64)
    messages = answers(shared, UNEQUAL, halves=halves)
    new, metrics = step(FlexLoRA(), messages, shared)
    for layer in LAYERS:
        assert error(held(new, layer), mean_product(shared, messages, layer)) < 1e-9
    assert metrics["deviation"] < 1e-7


def test_refuses_an_energy_out_of_range() -> None:
    for energy in (0.0, 1.5):
        with pytest.raises(LichenError, match="energy"):
            FLoRIST(energy)
