"""FedSVD keeps the mean product, turns A orthonormal, and needs sums alone.

Legend: m rows, n columns, r rank.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.server.lowrank.fedsvd import FedSVD
from lichen.server.lowrank.lowrank import FedIT
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from support.dense_adapters import EQUAL, LAYERS, UNEQUAL, answers, close, error, held, mean_product, start
from support.flat import updated


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("b", [0.0, 0.05])
def test_the_product_stays_and_the_rows_of_a_are_orthonormal(dtype: torch.dtype, tolerance: float, b: Any) -> None:
    shared = start(dtype, b=b)
    for t in range(3):
        messages = answers(shared, EQUAL, seed=t, halves="B")
        plain, said = close(Mean(), messages, shared)
        averaged, _ = updated(ServerSGD(), plain, {}, shared)
        change, metrics = close(FedSVD(), messages, shared)
        new, _ = updated(ServerSGD(), change, {}, shared)
        assert metrics == said
        for layer, (_, _, r) in LAYERS.items():
            assert error(held(new, layer), held(averaged, layer)) < tolerance
            A, B = new[f"{layer}.lora_A"].double(), new[f"{layer}.lora_B"].double()
            torch.testing.assert_close(A @ A.T, torch.eye(r).double(), rtol=0, atol=10 * tolerance)
            gram = B.T @ B
            assert float((gram - gram.diag().diag()).abs().max()) < 10 * tolerance * float(gram.max())
            assert (gram.diag().diff() <= 0).all()
        assert torch.equal(change["head.weight"], plain["head.weight"])
        shared = new


def test_unequal_ranks_and_layers_with_a_mean_that_takes_them() -> None:
    shared = start(torch.float64)
    messages = answers(shared, UNEQUAL, halves="B")
    member = FedSVD(FedIT())
    new, _ = updated(ServerSGD(), close(member, messages, shared)[0], {}, shared)
    for layer in LAYERS:
        assert error(held(new, layer), mean_product(shared, messages, layer)) < 1e-9


def test_a_rank_beyond_the_layer_leaves_rows_that_add_nothing_and_can_learn() -> None:
    shared = start(torch.float64, layers={"thin": (3, 40, 5)})
    messages = answers(shared, [client._replace(rank=5) for client in EQUAL], halves="B")
    new, _ = updated(ServerSGD(), close(FedSVD(), messages, shared)[0], {}, shared)
    assert error(held(new, "thin"), mean_product(shared, messages, "thin")) < 1e-10
    assert not new["thin.lora_B"][:, 3:].any()
    assert (new["thin.lora_A"][3:].norm(dim=1) > 0.2).all()


def test_refuses_clients_that_trained_a() -> None:
    shared = start(torch.float32)
    with pytest.raises(LichenError, match="freeze lora_A"):
        close(FedSVD(), answers(shared, EQUAL), shared)
