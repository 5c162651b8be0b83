"""The lower bound on ε from one run: the paper's numbers, and never above what is true."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lichen.audit.one_run import epsilon_at_least, guessed
from lichen.core.errors import LichenError


@pytest.mark.parametrize(
    ("guesses", "right", "bound"),
    [(100, 100, 3.493), (100, 90, 1.631), (100, 75, 0.702), (1000, 750, 0.977), (200, 190, 2.398), (50, 50, 2.785)],
)
def test_the_papers_vectors(guesses: int, right: int, bound: float) -> None:
    assert abs(epsilon_at_least(guesses, right) - bound) < 5e-4


def test_it_grows_with_what_is_right_and_falls_with_delta_and_with_canaries() -> None:
    bounds = [epsilon_at_least(100, right, delta=1e-5) for right in range(50, 101, 10)]
    assert bounds == sorted(bounds)
    assert bounds[0] == 0.0
    assert epsilon_at_least(100, 95, delta=1e-4) < epsilon_at_least(100, 95, delta=1e-6) < epsilon_at_least(100, 95)
    assert epsilon_at_least(100, 95, delta=1e-4, canaries=1000) < epsilon_at_least(100, 95, delta=1e-4)
    assert epsilon_at_least(100, 95, canaries=1000) == epsilon_at_least(100, 95)
    assert epsilon_at_least(0, 0) == epsilon_at_least(10, 0, delta=1e-5) == 0.0


def test_randomised_response_is_bounded_by_its_own_epsilon() -> None:
    """A coin is guessed right with chance e^ε / (1 + e^ε): the bound is seldom above ε, and near it."""
    epsilon, draw = 1.5, np.random.default_rng(0)
    chance = 1 / (1 + math.exp(-epsilon))
    bounds = [epsilon_at_least(1000, int(draw.binomial(1000, chance))) for _ in range(100)]
    assert sum(bound > epsilon for bound in bounds) <= 10
    assert np.median(bounds) > 1.2


def test_guesses_are_the_ends_of_the_scores() -> None:
    score = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])
    included = torch.tensor([True, False, True, True, False])
    assert [guessed(score, included, r) for r in range(6)] == [0, 1, 2, 3, 3, 3]
    assert guessed(-score, included, 4) == 1
    with pytest.raises(LichenError, match="6 guesses on 5"):
        guessed(score, included, 6)
    with pytest.raises(LichenError, match="9 right of 5"):
        epsilon_at_least(5, 9)
