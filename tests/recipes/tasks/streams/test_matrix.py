"""Forgetting and transfer, against their definitions written out."""

from __future__ import annotations

import pytest

from lichen.recipes.tasks.streams.matrix import transfer_of

R = [[0.2, 0.1, 0.3], [0.9, 0.3, 0.2], [0.6, 0.8, 0.5], [0.7, 0.4, 0.9]]


def test_forgetting_and_transfer_by_their_definitions() -> None:
    found = transfer_of(R, higher_is_better=True)
    assert found.prequential == (0.2, 0.3, 0.5)
    assert found.forgetting == pytest.approx((0.9 - 0.7, 0.8 - 0.4))
    assert found.forgotten == pytest.approx(0.3)
    assert found.backward == pytest.approx(((0.7 - 0.9) + (0.4 - 0.8)) / 2)
    assert found.forward == pytest.approx(((0.3 - 0.1) + (0.5 - 0.3)) / 2)


def test_where_less_is_better_signs_turn_and_what_is_unknown_is_left_out() -> None:
    found = transfer_of([[-x for x in row] for row in R], higher_is_better=False)
    assert found.forgetting == pytest.approx((0.2, 0.4))
    assert (found.backward, found.forward) == pytest.approx((-0.3, 0.2))
    holes = [[None, 0.1, 0.3], *R[1:3], [0.7, None, 0.9]]
    found = transfer_of(holes, higher_is_better=True)
    assert (found.prequential[0], found.forgetting[1]) == (None, None)
    assert found.backward == pytest.approx(0.7 - 0.9)


def test_one_period_forgets_nothing() -> None:
    found = transfer_of([[0.1], [0.5]], higher_is_better=True)
    assert (found.prequential, found.forgetting, found.forgotten) == ((0.1,), (), None)
    assert (found.backward, found.forward) == (None, None)
