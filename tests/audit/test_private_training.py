"""The one-run audit of DP-SGD itself; ``benchmarks/one_run.py`` has more runs."""

from __future__ import annotations

import one_run
import pytest

from lichen.transforms.privacy import sigma_for


def test_the_noise_is_that_of_the_stated_epsilon() -> None:
    pytest.importorskip("dp_accounting")
    assert 0.99 * one_run.SIGMA < sigma_for(one_run.EPSILON, one_run.DELTA, one_run.STEPS) <= one_run.SIGMA


def test_the_bound_stays_below_what_is_stated_and_finds_noise_that_is_too_small() -> None:
    assert all(0 < one_run.bound_of(seed, one_run.SIGMA) <= one_run.EPSILON for seed in range(4))
    assert all(one_run.bound_of(seed, one_run.SIGMA / 4) > one_run.EPSILON for seed in range(4))
    assert one_run.bound_of(0, 0.0) > one_run.EPSILON
