"""What bins tell of scores is right to half a bin, and what lies outside is in the last on its side."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.core.conventions.bins import Bins
from lichen.present.summary import worst_decile

SHARES = Bins(low=0.0, high=1.0, count=200)
RATIOS = Bins(low=1.0, high=2.0**20, count=480, ratio=True)


def counts_of(bins: Bins, scores: list[float]) -> list[int]:
    counts = [0] * bins.count
    for score in scores:
        counts[bins.place(score)] += 1
    return counts


@given(scores=st.lists(st.floats(0, 1), min_size=1, max_size=60), higher=st.booleans())
def test_equal_bins_are_right_to_half_their_width(scores: list[float], higher: bool) -> None:
    counts, half = counts_of(SHARES, scores), 0.5 / 200 + 1e-12
    assert SHARES.worst(counts, higher_is_better=higher) == pytest.approx(worst_decile(scores, higher), abs=half)
    ordered = sorted(scores)
    exact = [ordered[max(0, math.ceil(tenth * len(scores) / 10) - 1)] for tenth in range(1, 10)]
    assert SHARES.deciles(counts) == pytest.approx(exact, abs=half)


@given(scores=st.lists(st.floats(1, 2.0**20), min_size=1, max_size=60), higher=st.booleans())
def test_bins_of_equal_ratio_are_right_to_half_of_it(scores: list[float], higher: bool) -> None:
    half = 2.0 ** (0.5 / 24) - 1 + 1e-9
    found = RATIOS.worst(counts_of(RATIOS, scores), higher_is_better=higher)
    assert found == pytest.approx(worst_decile(scores, higher), rel=half)


@pytest.mark.parametrize("bins", [SHARES, RATIOS])
@pytest.mark.parametrize(("score", "place"), [(-math.inf, 0), (-3.0, 0), (math.inf, -1), (2.0**30, -1)])
def test_scores_outside_are_in_the_last_bin_on_their_side(bins: Bins, score: float, place: int) -> None:
    assert bins.place(score) == place % bins.count


@pytest.mark.parametrize("bins", [SHARES, RATIOS])
def test_no_score_is_in_no_bin(bins: Bins) -> None:
    assert bins.place(math.nan) == -1
