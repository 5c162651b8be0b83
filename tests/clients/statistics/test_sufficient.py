"""Ridge statistics: exact in any order, and honest about their range."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.clients.statistics.sufficient import Statistics
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.tree import digest
from support.toy_cohorts import fold, job, rows


def features(batch: Batch) -> Any:
    return batch["x_CBF"]


def whole(x: Any, y: Any, **more: Any) -> Any:
    """Statistics of these rows in one client and one batch."""
    batch = {"active_C": torch.tensor([True]), "x_CBF": x[None], "labels_CB": y[None]}
    return fold(Statistics(features, classes=3, width=x.shape[-1], **more), job({}, [0]), [batch])[0]


@given(seed=st.integers(0, 2**20), cuts=st.lists(st.integers(0, 40), max_size=6), scale=st.sampled_from([1e-3, 1, 30]))
@settings(max_examples=40, deadline=None)
def test_any_partition_in_any_order_sums_to_the_same_bytes(seed: int, cuts: Any, scale: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(40, 6, generator=g) * scale, torch.randint(-1, 3, (40,), generator=g)
    order = torch.randperm(40, generator=g)
    edges = sorted({0, 40, *cuts})
    parts = [whole(x[order[a:b]], y[order[a:b]]) for a, b in pairwise(edges)]
    pooled = whole(x, y).tensors
    total = {n: sum(part.tensors[n] for part in parts) for n in pooled}
    assert digest(total) == digest(pooled)
    assert sum(float(part.weight_C) for part in parts) == int((y >= 0).sum())


def test_equals_dense_algebra_on_the_rounded_features() -> None:
    batch = rows(0, range(2), count=9)
    batch["labels_CB"][0, 2] = -100
    batch["index_CB"][1, 5] = -1
    batch["x_CBF"][1, 5] = torch.nan
    message, _ = fold(
        Statistics(features, classes=3, width=batch["x_CBF"].shape[-1], bits=10), job({}, range(2)), [batch]
    )
    for c, dropped in ((0, 2), (1, 5)):
        keep = [b for b in range(9) if b != dropped]
        x = (batch["x_CBF"][c][keep].double() * 1024).round() / 1024
        x = torch.cat([x, torch.ones(8, 1).double()], 1)
        y = torch.eye(3).double()[batch["labels_CB"][c][keep]]
        assert torch.equal(message.tensors["G"][c], x.T @ x)
        assert torch.equal(message.tensors["H"][c], x.T @ y)
        assert torch.equal(message.tensors["n"][c], y.sum(0))


def test_refuses_to_leave_the_exact_range() -> None:
    x, y = torch.full((4, 2), 182.0), torch.zeros(4, dtype=torch.int64)
    assert float(whole(x[:3], y[:3]).tensors["G"][0, 0, 0]) == 3 * 182**2
    with pytest.raises(LichenError, match="not exact"):
        whole(x, y)
    assert float(whole(x, y, bits=12).tensors["G"][0, 0, 0]) == 4 * 182**2


def test_refuses_bad_rows_and_takes_empty_clients() -> None:
    with pytest.raises(LichenError, match="not one of 3 classes"):
        whole(torch.ones(1, 2), torch.tensor([3]))
    with pytest.raises(LichenError, match="not finite"):
        whole(torch.full((1, 2), torch.inf), torch.tensor([1]))
    with pytest.raises(LichenError, match="rows have 5 features, not 2"):
        fold(Statistics(features, classes=3, width=2), job({}, [0]), [rows(0, [0], count=2)])
    message, _ = fold(Statistics(features, classes=3, width=2), job({}, [4]), [])
    assert {n: tuple(x.shape) for n, x in message.tensors.items()} == {"G": (1, 3, 3), "H": (1, 3, 3), "n": (1, 3)}
    assert message.weight_C.tolist() == [0]
    with pytest.raises(LichenError, match="bits"):
        Statistics(features, classes=3, width=2, bits=30)
