"""HetLoRA against a loop over clients and layers.

Legend: r rank.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.server.lowrank.hetlora import HetLoRA
from lichen.server.mean import Mean
from support.dense_adapters import EQUAL, LAYERS, UNEQUAL, answers, close, mean_product, own, senders, start


def norm(shared: Tree, message: Message) -> Any:
    total = 0.0
    for layer in LAYERS:
        if f"{layer}.lora_A" in message.tensors:
            B, A = own(shared, message, layer)
            total += float((B @ A).square().sum())
    return total**0.5


@pytest.mark.parametrize("clients", [EQUAL, UNEQUAL, UNEQUAL[1:]])
def test_weighs_by_share_and_norm_and_pads_with_zeros(clients: int) -> None:
    shared = start(torch.float64)
    messages = answers(shared, clients)
    change, metrics = close(HetLoRA(), messages, shared)
    lost = kept = 0.0
    for layer in LAYERS:
        A_rn = torch.zeros_like(shared[f"{layer}.lora_A"])
        B_mr = torch.zeros_like(shared[f"{layer}.lora_B"])
        total = sum(p * norm(shared, m) for p, m in senders(messages, layer))
        for p, m in senders(messages, layer):
            B, A = own(shared, m, layer)
            A_rn[: A.shape[0]] += p * norm(shared, m) / total * A
            B_mr[:, : B.shape[1]] += p * norm(shared, m) / total * B
        torch.testing.assert_close(shared[f"{layer}.lora_A"] + change[f"{layer}.lora_A"], A_rn)
        torch.testing.assert_close(shared[f"{layer}.lora_B"] + change[f"{layer}.lora_B"], B_mr)
        ideal = mean_product(shared, messages, layer)
        lost, kept = lost + float((ideal - B_mr @ A_rn).square().sum()), kept + float(ideal.square().sum())
    assert metrics["deviation"] == pytest.approx((lost / kept) ** 0.5, rel=1e-8)
    if clients is EQUAL:
        plain, _ = close(Mean(), messages, shared)
        assert torch.equal(change["head.weight"], plain["head.weight"])


def test_where_nobody_moved_shares_alone_weigh() -> None:
    shared = start(torch.float64, b=0.0)
    messages = answers(shared, EQUAL, scale=0.0)
    change, metrics = close(HetLoRA(), messages, shared)
    assert all(float(x.abs().max()) < 1e-12 for x in change.values())
    assert metrics["deviation"] == 0.0


def test_refuses_one_half_alone() -> None:
    shared = start(torch.float32)
    with pytest.raises(LichenError, match="one half of layer"):
        close(HetLoRA(), answers(shared, EQUAL, halves="B"), shared)
