"""FedIT's deviation and FedEx's exactness against dense algebra, on layers that are not square.

Legend: m rows, n columns, r rank.
"""

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import digest
from lichen.server.lowrank import FedEx, FedIT
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD

LAYERS = {"low": (9, 40, 2), "tall": (37, 8, 3)}


def start(dtype, seed=0, layers=LAYERS):
    g = torch.Generator().manual_seed(seed)
    shared = {"head.weight": torch.randn(3, 5, generator=g).to(dtype)}
    for layer, (m, n, r) in layers.items():
        shared[f"{layer}.lora_A"] = torch.randn(r, n, generator=g, dtype=torch.float64).to(dtype)
        shared[f"{layer}.lora_B"] = torch.zeros(m, r, dtype=dtype)
    return shared


def answers(shared, weights, seed, scale=0.3, names=None):
    g = torch.Generator().manual_seed(seed)
    C = len(weights)
    trained = {n: x for n, x in shared.items() if not n.startswith("patch.") and (names is None or n in names)}
    return Message(
        group="g",
        client_C=torch.arange(C),
        version_C=torch.zeros(C, dtype=torch.int64),
        tensors={
            n: (torch.randn(C, *x.shape, generator=g, dtype=torch.float64) * scale).to(x) for n, x in trained.items()
        },
        weight_C=torch.tensor(weights, dtype=torch.float64),
    )


def products(shared, sent, weights, layer):
    """Σ p_k B_k A_k, dense."""
    p = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    A = shared[f"{layer}.lora_A"].double() + sent.tensors[f"{layer}.lora_A"].double()
    B = shared[f"{layer}.lora_B"].double() + sent.tensors[f"{layer}.lora_B"].double()
    return torch.einsum("c,cmr,crn->mn", p, B, A)


def patch(shared, layer, m, n):
    if f"patch.{layer}.dense" in shared:
        assert f"patch.{layer}.left" not in shared
        return shared[f"patch.{layer}.dense"].double()
    if f"patch.{layer}.left" in shared:
        left, right = shared[f"patch.{layer}.left"].double(), shared[f"patch.{layer}.right"].double()
        assert left.shape[1] * (m + n) < m * n
        return left @ right
    return torch.zeros(m, n, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [5.0, 1.0], [100.0, 3.0, 0.5, 17.0]])
def test_fedex_is_exact_round_after_round(dtype, tolerance, weights):
    scaling = 1.7
    fedex, server = FedEx(scaling), ServerSGD()
    shared = start(dtype)
    ideal = {layer: torch.zeros(m, n, dtype=torch.float64) for layer, (m, n, _) in LAYERS.items()}
    forms = set()
    for t in range(5):
        sent = answers(shared, weights, t)
        for layer, (m, n, _) in LAYERS.items():
            ideal[layer] = patch(shared, layer, m, n) + scaling * products(shared, sent, weights, layer)
        change, metrics = fedex.close(fedex.add(fedex.zero(), sent), shared)
        shared, _ = server.update(change, {}, shared)
        for layer, (m, n, _) in LAYERS.items():
            BA = shared[f"{layer}.lora_B"].double() @ shared[f"{layer}.lora_A"].double()
            got = patch(shared, layer, m, n) + scaling * BA
            assert float((got - ideal[layer]).norm() / ideal[layer].norm()) < tolerance
        forms |= {n.rsplit(".", 1)[1] for n in shared if n.startswith("patch.")}
        assert 0 < metrics["deviation"] < 2
        assert all(x.dtype == dtype for x in shared.values())
    assert forms == {"left", "right", "dense"}


@pytest.mark.parametrize("weights", [[1.0, 1.0], [5.0, 1.0, 2.0], [1.0] * 30])
def test_deviation_equals_dense_algebra(weights):
    shared = start(torch.float64)
    shared = {n: x + 0.1 if n.endswith("lora_B") else x for n, x in shared.items()}
    sent = answers(shared, weights, 3)
    fedit, fedex = FedIT(), FedEx(2.0)
    change, metrics = fedit.close(fedit.add(fedit.zero(), sent), shared)
    lost = kept = 0.0
    for layer in LAYERS:
        whole = products(shared, sent, weights, layer)
        A, B = (shared[f"{layer}.lora_{x}"] + change[f"{layer}.lora_{x}"] for x in "AB")
        lost, kept = lost + float((whole - B @ A).square().sum()), kept + float(whole.square().sum())
    assert metrics["deviation"] == pytest.approx((lost / kept) ** 0.5, rel=1e-10)
    _, mended = fedex.close(fedex.add(fedex.zero(), sent), shared)
    assert mended["deviation"] == pytest.approx(metrics["deviation"], rel=1e-10)


def test_fedit_changes_exactly_what_mean_does():
    shared, weights = start(torch.float32), [2.0, 0.0, 3.0]
    sent = answers(shared, weights, 1)
    mean, fedit, fedex = Mean(), FedIT(), FedEx(1.0)
    plain, _ = mean.close(mean.add(mean.zero(), sent), shared)
    change, _ = fedit.close(fedit.add(fedit.zero(), sent), shared)
    assert digest(change) == digest(plain)
    mended, _ = fedex.close(fedex.add(fedex.zero(), sent), shared)
    assert digest({n: x for n, x in mended.items() if not n.startswith("patch.")}) == digest(plain)


def test_the_factors_are_as_few_as_the_residual_needs():
    layers = {"big": (60, 90, 2)}
    for dtype in (torch.float32, torch.float64):
        shared = start(dtype, layers=layers)
        shared["big.lora_B"] += 0.2
        for clients in (2, 3, 4):
            fedex = FedEx(1.0)
            sent = answers(shared, [1.0 + k for k in range(clients)], 4)
            change, _ = fedex.close(fedex.add(fedex.zero(), sent), shared)
            # Σ p_k b_k = 0 binds one client's r directions to the others'.
            assert change["patch.big.left"].shape == (60, 2 * (clients - 1))
            assert change["patch.big.right"].shape == (2 * (clients - 1), 90)


def test_nothing_is_lost_where_a_is_frozen_or_one_client_came():
    shared = start(torch.float32)
    frozen = [n for n in shared if not n.endswith("lora_A")]
    for sent in (answers(shared, [1.0, 4.0], 2, names=frozen), answers(shared, [3.0], 2)):
        fedex, fedit = FedEx(1.0), FedIT()
        change, metrics = fedex.close(fedex.add(fedex.zero(), sent), shared)
        assert not any(n.startswith("patch.") for n in change)
        assert metrics["deviation"] < 1e-7
        assert fedit.close(fedit.add(fedit.zero(), sent), shared)[1]["deviation"] < 1e-7


def test_refuses_nothing_twice_the_same_client_and_no_scaling():
    shared = start(torch.float32)
    fedex = FedEx(1.0)
    with pytest.raises(LichenError, match="no client contributed"):
        fedex.close(fedex.zero(), shared)
    sent = answers(shared, [1.0], 0)
    with pytest.raises(LichenError, match="twice"):
        fedex.close(fedex.add(fedex.add(fedex.zero(), sent), sent), shared)
    with pytest.raises(LichenError, match="scaling"):
        FedEx(0.0)
    del shared["low.lora_B"]
    with pytest.raises(LichenError, match="without lora_B"):
        fedex.close(fedex.add(fedex.zero(), sent), shared)
