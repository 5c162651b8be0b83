"""Samplers: ascending, repeatable, and with the promised frequencies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator
from lichen.server.sampling import Everyone, Poisson, Uniform, Weighted

SAMPLERS = [Everyone(), Uniform(3), Poisson(0.4), Weighted(3)]


@given(seed=st.integers(0, 2**62), clients=st.integers(3, 30), which=st.sampled_from(SAMPLERS))
def test_ascending_distinct_in_range_and_a_function_of_the_seed(seed: int, clients: int, which: Any) -> None:
    weight_N = torch.arange(1, clients + 1, dtype=torch.float64)
    ids = which.invite(weight_N, seed)
    assert list(ids) == sorted(set(ids))
    assert all(0 <= i < clients and type(i) is int for i in ids)
    assert ids == which.invite(weight_N, seed)
    if isinstance(which, Uniform | Weighted):
        assert len(ids) == 3
    if isinstance(which, Everyone):
        assert len(ids) == clients


def test_frequencies() -> None:
    weight_N = torch.tensor([1.0, 1.0, 2.0, 4.0, 0.0])
    rounds = 3000

    def share(sampler: Any) -> Any:
        counts = torch.zeros(5)
        for seed in range(rounds):
            counts[list(sampler.invite(weight_N, seed))] += 1
        return (counts / rounds).tolist()

    assert share(Uniform(2)) == pytest.approx([0.4] * 5, abs=0.04)
    assert share(Poisson(0.3)) == pytest.approx([0.3] * 5, abs=0.04)
    assert share(Weighted(1)) == pytest.approx([1 / 8, 1 / 8, 1 / 4, 1 / 2, 0], abs=0.04)


def test_nobody_may_come_by_poisson_and_clients_without_examples_never_by_weight() -> None:
    empty = [seed for seed in range(200) if Poisson(0.05).invite(torch.ones(5), seed) == ()]
    assert len(empty) > 100
    assert Weighted(3).invite(torch.tensor([0.0, 5.0, 0.0, 1.0]), 0) == (1, 3)


@given(
    weights=st.lists(st.sampled_from([0.0, 1.0, 2.0, 50.0]), min_size=1, max_size=30),
    count=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_weighted_takes_those_who_wait_least(weights: Any, count: int, seed: int) -> None:
    count = min(count, len(weights))
    wait_N = numpy_generator(seed, "invite").exponential(size=len(weights))
    queue = sorted((wait / w, i) for i, (wait, w) in enumerate(zip(wait_N, weights, strict=True)) if w)
    assert Weighted(count).invite(torch.tensor(weights), seed) == tuple(sorted(i for _, i in queue[:count]))


def test_refuses_impossible_counts_and_rates() -> None:
    for make in (lambda: Uniform(0), lambda: Weighted(0), lambda: Poisson(0.0), lambda: Poisson(1.5)):
        with pytest.raises(LichenError, match="sampling"):
            make()
    for sampler in (Uniform(4), Weighted(4)):
        with pytest.raises(LichenError, match="roster of 3"):
            sampler.invite(torch.ones(3), 0)
    with pytest.raises(LichenError, match="weight"):
        Weighted(1).invite(torch.tensor([1.0, -1.0]), 0)
