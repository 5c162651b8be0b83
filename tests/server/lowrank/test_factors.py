"""Norms and best factors against a dense singular value decomposition.

Legend: m rows, n columns, R rank of factors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.server.lowrank.factors import best, norm_square, shrink


@given(
    m=st.integers(1, 12), n=st.integers(1, 12), R=st.integers(1, 16), rank=st.integers(1, 14), seed=st.integers(0, 99)
)
@settings(max_examples=80, deadline=None)
def test_best_factors_leave_out_what_the_svd_says(m: Any, n: Any, R: Any, rank: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(a, b, generator=g, dtype=torch.float64) for a, b in ((m, R), (R, n)))
    dense = left @ right
    sigma = torch.linalg.svdvals(dense)
    tail = float(sigma[rank:].square().sum().sqrt())
    for product in ((left, right), dense):
        assert norm_square(product) == pytest.approx(float(dense.square().sum()), rel=1e-12)
        (U, V), lost = best(product, rank)
        assert U.shape == (m, V.shape[0])
        assert V.shape[0] <= rank
        size = float(sigma[0])
        assert lost == pytest.approx(tail, abs=1e-12 * size)
        assert float((dense - U @ V).norm()) == pytest.approx(tail, abs=1e-12 * size)


def test_shrink_keeps_what_is_above_the_floor_and_nothing_else() -> None:
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(20, 6, generator=g, dtype=torch.float64)).Q for _ in range(2))
    sigma = torch.tensor([8.0, 4.0, 1.0, 1e-3, 1e-9, 0.0], dtype=torch.float64)
    (left, right), square = shrink((U * sigma, V.T), 1e-2)
    assert left.shape == (20, 3)
    assert right.shape == (3, 20)
    assert square == pytest.approx(81.000001, rel=1e-12)
    assert torch.linalg.matrix_norm(left @ right - (U * sigma) @ V.T, ord=2) == pytest.approx(1e-3, rel=1e-9)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))
