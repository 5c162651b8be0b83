"""FLoRA against dense algebra: the mean model, whatever the ranks, and a new beginning.

Legend: m rows, n columns, r rank.
"""

from __future__ import annotations

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.server.lowrank.lowrank import FedIT
from lichen.server.lowrank.stacking import FLoRA
from lichen.server.optimize import ServerSGD
from support.dense_adapters import (
    EQUAL,
    LAYERS,
    UNEQUAL,
    Client,
    answers,
    close,
    error,
    held,
    mean_product,
    patch,
    start,
)
from support.flat import updated


@pytest.mark.parametrize("clients", [EQUAL, UNEQUAL, UNEQUAL * 8, [Client(2.0)]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_the_mean_model_round_after_round(clients: int, dtype: torch.dtype, tolerance: float) -> None:
    scaling, shared = 1.7, start(dtype)
    forms = set()
    for t in range(3):
        messages = answers(shared, clients, seed=t)
        before = {layer: patch(shared, layer) for layer in LAYERS}
        change, metrics = close(FLoRA(scaling), messages, shared)
        new, _ = updated(ServerSGD(), change, {}, shared)
        for layer in LAYERS:
            ideal = before[layer] + scaling * mean_product(shared, messages, layer)
            assert error(held(new, layer, scaling), ideal) < tolerance
            assert not new[f"{layer}.lora_B"].any()
        forms |= {name.rpartition(".")[2] for name in new if name.startswith("patch.")}
        assert all(x.dtype == dtype for x in new.values())
        assert 0 < metrics["rank"] <= sum(client.rank for client in clients)
        shared = new
    assert "dense" in forms


def test_the_patch_has_no_more_directions_than_the_clients() -> None:
    shared = start(torch.float64, layers={"large": (60, 90, 4)})
    change, metrics = close(FLoRA(1.0), answers(shared, [Client(1.0, 4), Client(2.0, 1), Client(1.0, 2)]), shared)
    assert change["patch.large.left"].shape == (60, 7)
    assert change["patch.large.right"].shape == (7, 90)
    assert metrics["rank"] == 7


def test_the_new_half_is_drawn_as_adapters_start_and_anew_each_version() -> None:
    shared = start(torch.float64)
    messages = answers(shared, EQUAL)
    change, metrics = close(FLoRA(1.0), messages, shared)
    A = shared["large.lora_A"] + change["large.lora_A"]
    assert float(A.abs().max()) <= 90**-0.5
    assert float(A.std()) == pytest.approx((3 * 90) ** -0.5, rel=0.1)
    later = answers(shared, EQUAL)
    for m in later:
        m.version_C.add_(1)
    for other in (close(FLoRA(1.0), later, shared)[0], close(FLoRA(1.0, seed=1), messages, shared)[0]):
        assert not torch.equal(other["large.lora_A"], change["large.lora_A"])
        assert torch.equal(other["patch.large.left"], change["patch.large.left"])
    assert metrics["deviation"] == pytest.approx(close(FedIT(), messages, shared)[1]["deviation"], rel=1e-6)


def test_nothing_trained_leaves_no_patch() -> None:
    shared = {n: x * 0 if n.endswith("lora_B") else x for n, x in start(torch.float32).items()}
    change, metrics = close(FLoRA(1.0), answers(shared, EQUAL, scale=0.0), shared)
    assert not any(name.startswith("patch.") for name in change)
    assert metrics["deviation"] == metrics["rank"] == 0.0


def test_refuses_no_scaling() -> None:
    with pytest.raises(LichenError, match="scaling"):
        FLoRA(0.0)
