"""Adapters of layers that are not square, clients of unequal ranks and layers, and dense algebra over them.

Legend: m rows, n columns, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lichen.core.message import Message
from lichen.core.tree import Tree
from support.flat import closed

LAYERS = {"low": (9, 40, 4), "tall": (37, 8, 4), "large": (60, 90, 4)}


class Client(NamedTuple):
    """A client's weight, rank, and the layers it leaves out."""

    weight: float
    rank: int = 4
    without: tuple[str, ...] = ()


EQUAL = (Client(5.0), Client(1.0), Client(2.5))
UNEQUAL = (Client(5.0, 4), Client(1.0, 1, ("tall",)), Client(2.5, 2), Client(3.0, 2, ("low", "tall")), Client(2.0, 1))


def start(
    dtype: torch.dtype, seed: int = 0, layers: Mapping[str, tuple[int, int, int]] = LAYERS, b: float = 0.05
) -> Any:
    """Shared tensors, some rounds on: B is not zero."""
    g = torch.Generator().manual_seed(seed)
    shared = {"head.weight": torch.randn(3, 5, generator=g).to(dtype)}
    for layer, (m, n, r) in layers.items():
        shared[f"{layer}.lora_A"] = torch.randn(r, n, generator=g, dtype=torch.float64).to(dtype) / n**0.5
        shared[f"{layer}.lora_B"] = torch.randn(m, r, generator=g, dtype=torch.float64).to(dtype) * b
    return shared


def answers(shared: Tree, clients: int, seed: int = 1, scale: float = 0.1, halves: str = "AB") -> Any:
    """One message a client: changes of its first directions, for the layers it trains."""
    g = torch.Generator().manual_seed(seed)
    messages = []
    for k, client in enumerate(clients):
        tensors = {}
        for name, x in shared.items():
            layer, _, kind = name.rpartition(".")
            if name.startswith("patch.") or layer in client.without:
                continue
            if kind.startswith("lora_"):
                if kind[-1] not in halves:
                    continue
                x = x[: client.rank] if kind == "lora_A" else x[:, : client.rank]
            tensors[name] = (torch.randn(1, *x.shape, generator=g, dtype=torch.float64) * scale).to(x)
        messages.append(
            Message(
                group="g",
                client_C=torch.tensor([k]),
                version_C=torch.tensor([3]),
                tensors=tensors,
                weight_C=torch.tensor([client.weight], dtype=torch.float64),
            )
        )
    return messages


def fold(aggregator: Any, messages: Sequence[Message]) -> Any:
    total = aggregator.zero()
    for message in messages:
        total = aggregator.add(total, message)
    return total


def close(aggregator: Any, messages: Sequence[Message], shared: Tree) -> Any:
    return closed(aggregator, fold(aggregator, messages), shared)


def own(shared: Tree, message: Message, layer: str) -> Any:
    """A client's own ``(B_k, A_k)``, float64: its part of the shared halves and its changes of them."""
    B, A = (shared[f"{layer}.lora_{half}"].double() for half in "BA")
    b, a = (message.tensors.get(f"{layer}.lora_{half}") for half in "BA")
    r = (b.shape[2] if b is not None else a.shape[1]) if b is not None or a is not None else 0
    B, A = B[:, :r], A[:r]
    return B if b is None else B + b[0].double(), A if a is None else A + a[0].double()


def senders(messages: Sequence[Message], layer: str) -> Any:
    """``(p_k, message)`` of those who sent the layer."""
    some = [m for m in messages if any(name.startswith(f"{layer}.lora_") for name in m.tensors)]
    weight = sum(float(m.weight_C) for m in some)
    return [(float(m.weight_C) / weight, m) for m in some]


def mean_product(shared: Tree, messages: Sequence[Message], layer: str) -> Any:
    """``Σ p_k B_k A_k`` over the clients that sent the layer, dense."""
    total = 0.0
    for p, message in senders(messages, layer):
        B, A = own(shared, message, layer)
        total = total + p * (B @ A)
    return total


def patch(shared: Tree, layer: str) -> Any:
    """The layer's patch, dense; zero where there is none."""
    if f"patch.{layer}.dense" in shared:
        assert f"patch.{layer}.left" not in shared
        return shared[f"patch.{layer}.dense"].double()
    if f"patch.{layer}.left" in shared:
        left, right = shared[f"patch.{layer}.left"].double(), shared[f"patch.{layer}.right"].double()
        assert left.shape[1] * (left.shape[0] + right.shape[1]) < left.shape[0] * right.shape[1]
        return left @ right
    return torch.zeros(())


def held(shared: Tree, layer: str, scaling: float = 1.0) -> Any:
    """What the layer gains: its patch and ``s B A``, dense."""
    B, A = (shared[f"{layer}.lora_{half}"].double() for half in "BA")
    return patch(shared, layer) + scaling * (B @ A)


def error(got: Any, true: Any) -> Any:
    return float((got - true).norm() / true.norm())
