"""FedIT's deviation and FedEx's exactness against dense algebra, factored and whole, on layers that are not square.

Legend: m rows, n columns, r rank.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.core.message import Message, take_client
from lichen.core.tree import Tree, digest, nbytes
from lichen.server.lowrank.lowrank import FedEx, FedIT, products
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from support.flat import closed, updated

LAYERS = {"low": (9, 40, 2), "tall": (37, 8, 3), "large": (60, 90, 2)}


def start(dtype: torch.dtype, seed: int = 0, layers: Any = LAYERS) -> Any:
    g = torch.Generator().manual_seed(seed)
    shared = {"head.weight": torch.randn(3, 5, generator=g).to(dtype)}
    for layer, (m, n, r) in layers.items():
        shared[f"{layer}.lora_A"] = torch.randn(r, n, generator=g, dtype=torch.float64).to(dtype)
        shared[f"{layer}.lora_B"] = torch.zeros(m, r, dtype=dtype)
    return shared


def answers(shared: Tree, weights: Any, seed: int, scale: float = 0.3, names: Any = None) -> Any:
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


def mean_products(shared: Tree, sent: Any, weights: Any, layer: str) -> Any:
    """Σ p_k B_k A_k, dense."""
    p = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    A = shared[f"{layer}.lora_A"].double() + sent.tensors[f"{layer}.lora_A"].double()
    B = shared[f"{layer}.lora_B"].double() + sent.tensors[f"{layer}.lora_B"].double()
    return torch.einsum("c,cmr,crn->mn", p, B, A)


def patch(shared: Tree, layer: str, m: Any, n: Any) -> Any:
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
def test_fedex_is_exact_round_after_round(dtype: torch.dtype, tolerance: float, weights: Any) -> None:
    scaling = 1.7
    fedex, server = FedEx(scaling), ServerSGD()
    shared = start(dtype)
    ideal = {layer: torch.zeros(m, n, dtype=torch.float64) for layer, (m, n, _) in LAYERS.items()}
    forms = set()
    for t in range(5):
        sent = answers(shared, weights, t)
        for layer, (m, n, _) in LAYERS.items():
            ideal[layer] = patch(shared, layer, m, n) + scaling * mean_products(shared, sent, weights, layer)
        change, metrics = closed(fedex, fedex.add(fedex.zero(), sent), shared)
        shared, _ = updated(server, change, {}, shared)
        for layer, (m, n, _) in LAYERS.items():
            BA = shared[f"{layer}.lora_B"].double() @ shared[f"{layer}.lora_A"].double()
            got = patch(shared, layer, m, n) + scaling * BA
            assert float((got - ideal[layer]).norm() / ideal[layer].norm()) < tolerance
        forms |= {n.rsplit(".", 1)[1] for n in shared if n.startswith("patch.")}
        assert 0 < metrics["deviation"] < 2
        assert all(x.dtype == dtype for x in shared.values())
    assert forms == {"left", "right", "dense"}


@pytest.mark.parametrize("weights", [[1.0, 1.0], [5.0, 1.0, 2.0], [1.0] * 30])
def test_deviation_equals_dense_algebra(weights: Any) -> None:
    shared = start(torch.float64)
    shared = {n: x + 0.1 if n.endswith("lora_B") else x for n, x in shared.items()}
    sent = answers(shared, weights, 3)
    fedit, fedex = FedIT(), FedEx(2.0)
    change, metrics = closed(fedit, fedit.add(fedit.zero(), sent), shared)
    lost = kept = 0.0
    for layer in LAYERS:
        whole = mean_products(shared, sent, weights, layer)
        A, B = (shared[f"{layer}.lora_{x}"] + change[f"{layer}.lora_{x}"] for x in "AB")
        lost, kept = lost + float((whole - B @ A).square().sum()), kept + float(whole.square().sum())
    assert metrics["deviation"] == pytest.approx((lost / kept) ** 0.5, rel=1e-10)
    _, mended = closed(fedex, fedex.add(fedex.zero(), sent), shared)
    assert mended["deviation"] == pytest.approx(metrics["deviation"], rel=1e-10)


def test_fedit_changes_exactly_what_mean_does() -> None:
    shared, weights = start(torch.float32), [2.0, 0.0, 3.0]
    sent = answers(shared, weights, 1)
    mean, fedit, fedex = Mean(), FedIT(), FedEx(1.0)
    plain, _ = closed(mean, mean.add(mean.zero(), sent), shared)
    change, _ = closed(fedit, fedit.add(fedit.zero(), sent), shared)
    assert digest(change) == digest(plain)
    mended, _ = closed(fedex, fedex.add(fedex.zero(), sent), shared)
    assert digest({n: x for n, x in mended.items() if not n.startswith("patch.")}) == digest(plain)


def test_the_factors_are_as_few_as_the_residual_needs() -> None:
    layers = {"big": (60, 90, 2)}
    for dtype in (torch.float32, torch.float64):
        shared = start(dtype, layers=layers)
        shared["big.lora_B"] += 0.2
        for clients in (2, 3, 4):
            fedex = FedEx(1.0)
            sent = answers(shared, [1.0 + k for k in range(clients)], 4)
            change, _ = closed(fedex, fedex.add(fedex.zero(), sent), shared)
            # Σ p_k b_k = 0 binds one client's r directions to the others'.
            assert change["patch.big.left"].shape == (60, 2 * (clients - 1))
            assert change["patch.big.right"].shape == (2 * (clients - 1), 90)


def test_nothing_is_lost_where_a_is_frozen_or_one_client_came() -> None:
    shared = start(torch.float32)
    frozen = [n for n in shared if not n.endswith("lora_A")]
    for sent in (answers(shared, [1.0, 4.0], 2, names=frozen), answers(shared, [3.0], 2)):
        fedex, fedit = FedEx(1.0), FedIT()
        change, metrics = closed(fedex, fedex.add(fedex.zero(), sent), shared)
        assert not any(n.startswith("patch.") for n in change)
        assert metrics["deviation"] < 1e-7
        assert closed(fedit, fedit.add(fedit.zero(), sent), shared)[1]["deviation"] < 1e-7


def test_refuses_nothing_twice_the_same_client_and_no_scaling() -> None:
    shared = start(torch.float32)
    fedex = FedEx(1.0)
    with pytest.raises(LichenError, match="no client contributed"):
        closed(fedex, fedex.zero(), shared)
    sent = answers(shared, [1.0], 0)
    with pytest.raises(LichenError, match="twice"):
        closed(fedex, fedex.add(fedex.add(fedex.zero(), sent), sent), shared)
    with pytest.raises(LichenError, match="scaling"):
        FedEx(0.0)
    del shared["low.lora_B"]
    with pytest.raises(LichenError, match="without lora_B"):
        closed(fedex, fedex.add(fedex.zero(), sent), shared)


def forms(total: Any) -> Any:
    return {layer: one.units_mn is not None for layer, one in total.layers.items()}


@pytest.mark.parametrize("weights", [[1.0, 1.0], [5.0, 1.0, 2.0], [100.0, 3.0, 0.5, 17.0], [1.0] * 30])
def test_both_forms_tell_the_same(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = start(torch.float64)
    shared = {n: x + 0.1 if n.endswith("lora_B") else x for n, x in shared.items()}
    sent, fedex = answers(shared, weights, 5), FedEx(1.3)
    told = []
    for fits in (True, False):
        monkeypatch.setattr(products, "_fits", lambda pairs, fits=fits: fits or not pairs)
        total = fedex.add(fedex.zero(), sent)
        assert set(forms(total).values()) == {not fits}
        change, metrics = closed(fedex, total, shared)
        told.append((metrics["deviation"], {k: patch(change, k, m, n) for k, (m, n, _) in LAYERS.items()}))
    (few, thin), (many, whole) = told
    assert many == pytest.approx(few, rel=1e-9)
    for layer in LAYERS:
        assert float((whole[layer] - thin[layer]).norm() / thin[layer].norm()) < 1e-9
    assert closed(FedIT(), total, shared)[1]["deviation"] == pytest.approx(few, rel=1e-9)


@pytest.mark.parametrize("clients", [1, 2, 3, 6, 12])
def test_the_form_and_its_bytes_follow_from_the_set_of_clients(clients: int) -> None:
    shared = start(torch.float32, layers={"early": (9, 40, 2), "late": (24, 24, 1)})
    fedit, sent = FedIT(), answers(shared, [1.0 + k for k in range(clients)], 6)
    whole = fedit.add(fedit.zero(), sent)
    ones = [fedit.add(fedit.zero(), take_client(sent, k)) for k in range(clients)]
    for order in itertools.islice(itertools.permutations(range(clients)), 0, 40, 7):
        line, tree = fedit.zero(), [ones[k] for k in order]
        for k in order:
            line = fedit.add(line, take_client(sent, k))
        while len(tree) > 1:
            tree = [fedit.merge(*tree[i : i + 2]) if i + 1 < len(tree) else tree[i] for i in range(0, len(tree), 2)]
        for total in (line, tree[0]):
            assert digest(fedit.dump(total)[0]) == digest(fedit.dump(whole)[0])
            assert fedit.dump(total)[1] == fedit.dump(whole)[1]
    assert forms(whole) == {"early": clients * 4 * 98 >= 8 * 360, "late": clients * 4 * 48 >= 8 * 576}


def test_memory_does_not_grow_with_the_clients() -> None:
    shared = start(torch.float32)
    fedex, total, sizes = FedEx(1.0), FedEx(1.0).zero(), []
    for block in range(6):
        sent = answers(shared, [1.0] * 40, block)
        sent.client_C.add_(40 * block)
        total = fedex.add(total, sent)
        sizes.append(nbytes(fedex.dump(total)[0]))
    (mean,) = total.sums.sums.values()
    most = sum(8 * m * n for m, n, _ in LAYERS.values()) + 8 * mean.units_N.numel()
    assert sizes[-1] == sizes[2] == most
    assert closed(fedex, total, shared)[1]["clients"] == 240


def test_a_product_that_is_too_large_is_refused_and_named() -> None:
    shared = start(torch.float32, layers={"early": (9, 40, 2)})
    fedit, sent = FedIT(), answers(shared, [1.0] * 40, 0, scale=3000.0)
    with pytest.raises(LichenError, match=r"early.*64-bit range"):
        fedit.add(fedit.zero(), sent)
    few = fedit.add(fedit.zero(), take_client(sent, 0))
    assert forms(few) == {"early": False}
