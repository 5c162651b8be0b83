"""The closed-form head against scikit-learn, and its independence of the partition.

Legend: N rows, d features, K classes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as Oracle

from lichen.core.errors import LichenError
from lichen.core.message import Message, take_client
from lichen.core.tree import digest
from lichen.server.optimize import ServerSGD
from lichen.server.ridge import Ridge
from support.flat import closed, updated

N, D, K, BITS = 60, 7, 3, 18


def data(seed: int, bias: bool = False) -> Any:
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(N, D, generator=g, dtype=torch.float64) * 2**BITS).round() / 2**BITS
    y = torch.eye(K, dtype=torch.float64)[torch.randint(0, K, (N,), generator=g)]
    return (torch.cat([x, torch.ones(N, 1).double()], 1) if bias else x), y


def statistics(x: Any, y: Any, parts: Any) -> Any:
    """One stacked message, a client for every part."""
    return Message(
        group="s",
        client_C=torch.arange(len(parts)),
        version_C=torch.zeros(len(parts), dtype=torch.int64),
        tensors={
            "G": torch.stack([x[p].T @ x[p] for p in parts]),
            "H": torch.stack([x[p].T @ y[p] for p in parts]),
            "n": torch.stack([y[p].sum(0) for p in parts]),
        },
        weight_C=torch.tensor([float(len(p)) for p in parts]),
    )


@given(seed=st.integers(0, 2**20), power=st.integers(-3, 3), bias=st.booleans(), clients=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_equals_sklearn_on_the_pooled_rows(seed: int, power: Any, bias: Any, clients: int) -> None:
    x, y = data(seed, bias)
    ridge = Ridge(10.0**power, bias=bias)
    parts = [list(range(c, N, clients)) for c in range(clients)]
    change, metrics = closed(ridge, ridge.add(ridge.zero(), statistics(x, y, parts)), {})
    oracle = torch.from_numpy(Oracle(alpha=10.0**power, fit_intercept=False).fit(x.numpy(), y.numpy()).coef_)
    got = torch.cat([change["head.weight"], change["head.bias"][:, None]], 1) if bias else change["head.weight"]
    assert float((got - oracle).abs().max()) <= 1e-8
    assert metrics == {"clients": clients, "examples": N}


@given(seed=st.integers(0, 2**20), cuts=st.lists(st.integers(0, N), max_size=6))
@settings(max_examples=40, deadline=None)
def test_any_partition_order_and_pairing_gives_the_same_bytes(seed: int, cuts: Any) -> None:
    x, y = data(seed)
    g = torch.Generator().manual_seed(seed)
    order, edges = torch.randperm(N, generator=g), sorted({0, N, *cuts})
    parts = [order[a:b].tolist() for a, b in pairwise(edges)]
    ridge = Ridge(0.1, bias=False)
    pooled, _ = closed(ridge, ridge.add(ridge.zero(), statistics(x, y, [list(range(N))])), {})
    split = statistics(x, y, parts)
    totals = [ridge.add(ridge.zero(), take_client(split, k)) for k in torch.randperm(len(parts), generator=g).tolist()]
    while len(totals) > 1:  # AFL's route: two by two
        totals = [
            ridge.merge(*totals[i : i + 2]) if i + 1 < len(totals) else totals[i] for i in range(0, len(totals), 2)
        ]
    assert digest(closed(ridge, totals[0], {})[0]) == digest(pooled)


def test_any_positive_lambda_serves_even_where_rows_are_fewer_than_features() -> None:
    x, y = data(0)
    x = torch.cat([x, x], 1)
    message = statistics(x, y, [list(range(N))])
    for lam in (1e-12, 1e-200):
        ridge = Ridge(lam, bias=False)
        change, _ = closed(ridge, ridge.add(ridge.zero(), message), {})
        few = torch.linalg.pinv(x, rtol=1e-10) @ y
        assert float((x @ change["head.weight"].T - x @ few).abs().max()) < 1e-3


def test_the_change_leads_from_the_shared_head_to_the_solution() -> None:
    x, y = data(1, bias=True)
    ridge, server = Ridge(1.0), ServerSGD()
    total = ridge.add(ridge.zero(), statistics(x, y, [list(range(N))]))
    solution, _ = closed(ridge, total, {})
    for head in (torch.zeros(K, D), torch.ones(K, D) * 3):
        shared = {"head.weight": head, "head.bias": torch.zeros(K)}
        change, _ = closed(ridge, total, shared)
        new, _ = updated(server, change, {}, shared)
        torch.testing.assert_close(new["head.weight"].double(), solution["head.weight"], rtol=1e-6, atol=1e-6)
        assert torch.equal(new["head.bias"], solution["head.bias"].float())


def test_refuses_what_is_no_statistics() -> None:
    x, y = data(0)
    ridge = Ridge(1.0, bias=False)
    message = statistics(x, y, [list(range(N))])
    with pytest.raises(LichenError, match="no client contributed"):
        closed(ridge, ridge.zero(), {})
    with pytest.raises(LichenError, match="Statistics"):
        ridge.add(
            ridge.zero(), Message(**{f: getattr(message, f) for f in KEYS} | {"tensors": {"w": torch.ones(1, 2)}})
        )
    with pytest.raises(LichenError, match="head"):
        closed(ridge, ridge.add(ridge.zero(), message), {"head.weight": torch.zeros(K, D + 1)})
    for lam in (0.0, -1.0, float("nan")):
        with pytest.raises(LichenError, match="lam"):
            Ridge(lam)


KEYS = ("group", "client_C", "version_C", "tensors", "weight_C")
