"""AUC and true positives against plain counting, and intervals that hold what is true as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from lichen.audit.separation import auc, separation, true_positives
from lichen.core.errors import LichenError


def test_auc_is_the_count_of_pairs() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        member, other = draw.integers(0, 6, 13).astype(float), draw.integers(0, 5, 9).astype(float)
        pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in member for b in other]
        assert abs(auc(member, other) - sum(pairs) / len(pairs)) < 1e-12


def test_true_positives_never_let_more_false_ones_through() -> None:
    draw = np.random.default_rng(1)
    for rate in (0.0, 0.01, 0.1, 0.5):
        member, other = draw.normal(1, 1, 300).round(1), draw.normal(0, 1, 250).round(1)
        best = max(float((member > t).mean()) for t in [*other, -np.inf] if (other > t).sum() <= rate * 250)
        assert true_positives(member, other, rate) == best


def test_intervals_hold_the_truth_and_shrink_with_rows() -> None:
    """Normal scores a deviation apart have AUC 0.760; 40 draws, of which 95 % should hold it."""
    draw, held, widths = np.random.default_rng(2), 0, []
    for seed in range(40):
        found = separation(draw.normal(1, 1, 80), draw.normal(0, 1, 80), seed=seed, resamples=200)
        held += found.auc_low <= 0.7602 <= found.auc_high
        widths.append(found.auc_high - found.auc_low)
        assert found.tpr_low <= found.tpr <= found.tpr_high
    assert held >= 34
    many = separation(draw.normal(1, 1, 2000), draw.normal(0, 1, 2000), seed=0, resamples=200)
    assert many.auc_high - many.auc_low < min(widths) / 2


def _again() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(3)
    return draw.normal(1, 1, 2000), draw.normal(0, 1, 2000)


def test_the_same_seed_gives_the_same_interval_and_no_side_may_be_empty() -> None:
    member, other = _again()
    assert separation(member, other, seed=1, resamples=50) == separation(member, other, seed=1, resamples=50)
    with pytest.raises(LichenError, match="0 members"):
        separation(np.zeros(0), other, seed=0)
    with pytest.raises(LichenError, match="no finite"):
        separation(np.array([np.nan]), other, seed=0)
