"""Federated averaging against the textbook formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.wire.shared import Shared
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from support.flat import closed, updated


def message(
    weights: Any, *, dtype: torch.dtype = torch.float32, seed: int = 0, group: str = "g", first: int = 0
) -> Any:
    g = torch.Generator().manual_seed(seed)
    C = len(weights)
    return Message(
        group=group,
        client_C=torch.arange(first, first + C),
        version_C=torch.zeros(C, dtype=torch.int64),
        tensors={"w": torch.randn(C, 3, 4, generator=g).to(dtype), "b": torch.randn(C, 4, generator=g).to(dtype)},
        weight_C=torch.tensor(weights, dtype=torch.float64),
    )


SHARED = {"w": torch.zeros(3, 4), "b": torch.zeros(4)}


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("share", [1.0, 0.37])
def test_is_the_weighted_mean(weighting: Any, share: float) -> None:
    weights = [3.0 * share, 0.0, 10.0 * share, 0.5 * share]
    sent = message(weights)
    mean = Mean(weighting)
    change, metrics = closed(mean, mean.add(mean.zero(), sent), SHARED)
    w = torch.tensor(weights, dtype=torch.float64) if weighting == "examples" else torch.tensor([1.0, 0, 1, 1]).double()
    for name in SHARED:
        expected = torch.einsum("c,c...->...", w, sent.tensors[name].double()) / w.sum()
        torch.testing.assert_close(change[name].double(), expected, rtol=1e-6, atol=1e-7)
        assert change[name].dtype == torch.float32
    assert metrics["clients"] == 3
    assert metrics["weight"] == pytest.approx(float(w.sum()), abs=1e-5)


def test_fractional_weights_do_not_bend_the_mean_of_equals() -> None:
    mean = Mean()
    total = mean.zero()
    for share in (1 / 3, 0.577, 1e-3):
        sent = message([1.0 * share, 7.0 * share])
        sent.tensors["w"][:] = 0.625
        total = mean.add(total, sent)
    change, _ = closed(mean, total, {})
    assert change["w"].dtype == torch.float64
    assert float((change["w"] - 0.625).abs().max()) < 1e-9


def test_a_poisoned_client_of_weight_zero_contributes_nothing() -> None:
    sent = message([2.0, 0.0])
    sent.tensors["w"][1] = torch.nan
    mean = Mean("uniform")
    change, _ = closed(mean, mean.add(mean.zero(), sent), SHARED)
    assert torch.equal(change["w"], sent.tensors["w"][0])


def test_reproduces_fedavg_bit_for_bit_with_sgd_at_one() -> None:
    g = torch.Generator().manual_seed(5)
    shared = {n: torch.randn(x.shape, generator=g) for n, x in SHARED.items()}
    mean, server = Mean(), ServerSGD()
    change, _ = closed(mean, mean.add(mean.zero(), message([1.0, 2.0])), shared)
    new, state = updated(server, change, server.init(Shared.of_flat(shared)), shared)
    assert state == {}
    assert all(torch.equal(new[n], shared[n] + change[n]) for n in shared)


def test_refuses_nothing_other_groups_and_other_shapes() -> None:
    mean = Mean()
    for total in (mean.zero(), mean.add(mean.zero(), message([0.0]))):
        with pytest.raises(LichenError, match="no client contributed"):
            closed(mean, total, SHARED)
    with pytest.raises(LichenError, match="do not add"):
        mean.add(mean.add(mean.zero(), message([1.0])), message([1.0], group="h"))
    with pytest.raises(LichenError, match="the model's is"):
        closed(mean, mean.add(mean.zero(), message([1.0])), {"w": torch.zeros(4, 3)})
    with pytest.raises(LichenError, match="weighting"):
        Mean("loudest")
    for divisor in ("best", 0.0, math.inf, math.nan):
        with pytest.raises(LichenError, match="no divisor"):
            Mean(divisor=divisor)  # type: ignore[arg-type]
    with pytest.raises(LichenError, match="63 bits"):
        Mean(lift_bits=63)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("divisor", ["discounted", "plain", 25.0])
def test_a_discount_multiplies_the_weight_and_the_divisor_is_a_choice(weighting: Any, divisor: Any) -> None:
    sent, age_C = message([3.0, 0.0, 10.0, 0.5]), torch.tensor([0, 1, 8, 3])
    discount_C = (1 + age_C.double()).rsqrt()
    mean = Mean(weighting, divisor=divisor)
    change, metrics = closed(mean, mean.add(mean.zero(), sent, discount_C), {})
    plain_C = sent.weight_C if weighting == "examples" else torch.tensor([1.0, 0, 1, 1]).double()
    over = {"discounted": float((plain_C * discount_C).sum()), "plain": float(plain_C.sum())}.get(divisor, 25.0)
    for name, x_C in sent.tensors.items():
        expected = torch.einsum("c,c...->...", plain_C * discount_C, x_C.double()) / over
        torch.testing.assert_close(change[name], expected, rtol=1e-7, atol=1e-8)
    assert metrics["clients"] == 3


def test_the_server_of_fedbuff() -> None:
    """Nguyen et al., algorithm 1: the changes that arrived, scaled by their staleness, over their number K."""
    mean, total, expected = Mean("uniform", divisor="plain"), Mean().zero(), torch.zeros(3, 4).double()
    for k, age in enumerate([0, 5, 2, 11]):
        sent, s = message([7.0 + k], seed=k, first=k), (1 + age) ** -0.5
        total = mean.add(total, sent, torch.tensor([s]))
        expected += float(torch.tensor(s)) * sent.tensors["w"][0].double() / 4
    torch.testing.assert_close(closed(mean, total, {})[0]["w"], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("discount", [[1.5, 1.0], [-0.1, 1.0], [math.nan, 1.0], [1.0]])
def test_refuses_a_discount_out_of_range(discount: Any) -> None:
    with pytest.raises(LichenError, match="from 0 to 1"):
        Mean().add(Mean().zero(), message([1.0, 2.0]), torch.tensor(discount))
