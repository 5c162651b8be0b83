"""Partition: every row once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.data.sources.records import Record
from lichen.data.splits.partition import by_client, dirichlet, iid


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=12, max_size=120),
    clients=st.integers(1, 6),
    alpha=st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 100.0]),
    least=st.integers(0, 2),
    seed=st.integers(0, 2**40),
)
def test_dirichlet_deals_every_row_once(labels: list[int], clients: int, alpha: float, least: int, seed: int) -> None:
    parts = dirichlet(labels, clients=clients, alpha=alpha, seed=seed, min_examples=least)
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert min(len(part) for part in parts) >= least
    again = dirichlet(labels, clients=clients, alpha=alpha, seed=seed, min_examples=least)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 200), clients=st.integers(1, 20), seed=st.integers(0, 99))
def test_iid_deals_every_row_once_and_evenly(n: int, clients: int, seed: int) -> None:
    if n < clients:
        with pytest.raises(LichenError, match="too few"):
            iid(n, clients=clients, seed=seed)
        return
    parts = iid(n, clients=clients, seed=seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_small_alpha_is_more_skewed_than_large() -> None:
    labels = np.repeat(np.arange(10), 100)

    def top_share(alpha: float) -> float:
        parts = dirichlet(labels, clients=10, alpha=alpha, seed=3)
        return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))

    assert top_share(0.05) > 0.5 > 0.2 > top_share(100.0)


def test_dirichlet_seeds_differ_and_bad_input_is_told() -> None:
    labels = list(range(5)) * 20
    one, two = (dirichlet(labels, clients=4, alpha=1.0, seed=s) for s in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    with pytest.raises(LichenError, match=r"data\.partition\.alpha"):
        dirichlet(labels, clients=4, alpha=0.0, seed=0)
    with pytest.raises(LichenError, match="too few"):
        dirichlet(labels, clients=4, alpha=1.0, seed=0, min_examples=26)


def test_by_client_is_sorted_and_complete() -> None:
    found = by_client([Record(client=c, text="x") for c in "cabac"])
    assert {c: rows.tolist() for c, rows in found.items()} == {"a": [1, 3], "b": [2], "c": [0, 4]}
    assert list(found) == ["a", "b", "c"]
