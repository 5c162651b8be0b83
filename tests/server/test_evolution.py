"""The clients' distributions become one: against a plain mixture, and as an exact monoid.

Legend: C clients, D numbers searched.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from lichen.core.errors import LichenError
from lichen.core.message import Message, concatenate_messages, take_client
from lichen.core.tree import digest, plain
from lichen.server.evolution import Evolution
from lichen.server.optimize import ServerSGD
from support.flat import closed, updated

D = 6
SHARED = {"mean": torch.linspace(-1, 1, D), "std": torch.full((D,), 0.5, dtype=torch.float16)}
FAMILY = {"within": Evolution(), "mixture": Evolution(between=1.0), "uniform": Evolution("uniform", between=0.5)}
every = pytest.mark.parametrize("name", FAMILY)
some = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**20)


def message_of(clients: int, seed: int) -> Message:
    g = torch.Generator().manual_seed(seed)
    return Message(
        group="g",
        client_C=torch.arange(clients),
        version_C=torch.zeros(clients, dtype=torch.int64),
        tensors={
            "mean": torch.randn(clients, D, generator=g),
            "std": (torch.rand(clients, D, generator=g) + 0.1).half(),
        },
        weight_C=torch.randint(1, 9, (clients,), generator=g).double(),
    )


def outcome(member: Evolution, total: object) -> tuple[str, dict[str, float]]:
    change, metrics = closed(member, total, SHARED)  # type: ignore[arg-type]
    return digest(change), metrics


@given(clients=st.integers(1, 6), seed=seeds, between=st.sampled_from([0.0, 0.5, 1.0]))
@some
def test_it_is_the_moment_of_the_mixture(clients: int, seed: int, between: float) -> None:
    member, message = Evolution(between=between), message_of(clients, seed)
    change, metrics = closed(member, member.add(member.zero(), message), SHARED)
    w_C1 = (message.weight_C / message.weight_C.sum())[:, None]
    shift_CD, std_CD = message.tensors["mean"].double(), message.tensors["std"].double()
    mean_D = (w_C1 * shift_CD).sum(0)
    variance_D = (w_C1 * (std_CD.square() + between * (shift_CD - mean_D).square())).sum(0)
    torch.testing.assert_close(change["mean"].double(), mean_D, rtol=1e-6, atol=1e-6)
    shared, _ = updated(ServerSGD(), change, {}, SHARED)
    torch.testing.assert_close(shared["std"].double(), variance_D.sqrt(), rtol=2e-3, atol=2e-3)
    assert shared["std"].dtype == torch.float16
    assert metrics["clients"] == clients
    assert metrics["spread"] == pytest.approx(float(variance_D.mean().sqrt()), rel=1e-6)


@every
@given(clients=st.integers(2, 7), seed=seeds, order=st.randoms(use_true_random=False))
@some
def test_any_order_and_grouping_give_the_same_bytes(name: str, clients: int, seed: int, order: object) -> None:
    member, message = FAMILY[name], message_of(clients, seed)
    whole = outcome(member, member.add(member.zero(), message))
    places = list(range(clients))
    order.shuffle(places)  # type: ignore[attr-defined]
    folded, merged = member.zero(), member.zero()
    for k in places:
        folded = member.add(folded, take_client(message, k))
        merged = member.merge(member.add(member.zero(), take_client(message, k)), merged)
    assert outcome(member, folded) == outcome(member, merged) == whole
    tensors, header = member.dump(folded)
    assert outcome(member, member.load(load(save(plain(tensors))), json.loads(json.dumps(header)))) == whole


@every
@given(seed=seeds)
@some
def test_a_client_of_weight_zero_might_as_well_have_stayed_away(name: str, seed: int) -> None:
    member, message = FAMILY[name], message_of(3, seed)
    message.tensors["mean"][2] = torch.nan
    message = replace(message, weight_C=torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    two = concatenate_messages([take_client(message, 0), take_client(message, 1)])
    assert outcome(member, member.add(member.zero(), message)) == outcome(member, member.add(member.zero(), two))


@every
@given(seed=seeds)
@some
def test_masks_that_cancel_change_nothing(name: str, seed: int) -> None:
    member, message = FAMILY[name], message_of(2, seed)
    a, b = (member.add(member.zero(), take_client(message, k)) for k in range(2))
    mask = torch.randint(-(2**63), 2**63 - 1, a.units_N.shape, generator=torch.Generator().manual_seed(seed))
    masked = member.merge(replace(a, units_N=a.units_N + mask), replace(b, units_N=b.units_N - mask))
    assert outcome(member, masked) == outcome(member, member.merge(a, b))


def test_the_spread_stays_within_its_bounds() -> None:
    message = message_of(2, 0)
    for factor, want in ((1e-3, 0.01), (1e3, 2.0)):
        member = Evolution(least=0.01, most=2.0)
        scaled = replace(message, tensors={**message.tensors, "std": message.tensors["std"].float() * factor})
        change, _ = closed(member, member.add(member.zero(), scaled), SHARED)
        shared, _ = updated(ServerSGD(), change, {}, SHARED)
        torch.testing.assert_close(shared["std"].float(), torch.full((D,), want), rtol=2e-2, atol=0)


def test_refuses_what_is_no_search() -> None:
    member, message = Evolution(), message_of(2, 0)
    with pytest.raises(LichenError, match="expected mean and std"):
        member.add(member.zero(), replace(message, tensors={"mean": message.tensors["mean"]}))
    with pytest.raises(LichenError, match="no client contributed"):
        closed(member, member.zero(), SHARED)
    with pytest.raises(LichenError, match="the server's another"):
        closed(member, member.add(member.zero(), message), {"mean": torch.zeros(3), "std": torch.ones(3)})
    with pytest.raises(LichenError, match="share"):
        Evolution(between=2.0)
