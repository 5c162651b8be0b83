"""Random Fourier features: a Gaussian kernel in the mean, the same bits in any company; and MMD from sums.

Legend: N rows, d numbers, D features.
"""

from __future__ import annotations

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.server.drift.fourier import BITS, random_fourier
from lichen.server.drift.mmd import mmd_of


def rows(count: int, seed: int, width: int = 5) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_inner_products_are_the_kernel() -> None:
    x_Nd = rows(20, 0)
    phi_ND = random_fourier(5, 20_000, bandwidth=2.0, seed=3).units(x_Nd) * 2.0**-BITS
    kernel_NN = torch.exp(-torch.cdist(x_Nd.double(), x_Nd.double()).square() / 8)
    torch.testing.assert_close(phi_ND @ phi_ND.T, kernel_NN, rtol=0, atol=0.03)


def test_a_row_has_the_same_bits_in_any_company() -> None:
    for width, features in ((5, 512), (64, 30), (385, 77)):
        fourier, x_Nd = random_fourier(width, features, bandwidth=1.3), rows(33, 1, width)
        together_ND = fourier.units(x_Nd)
        for n in range(33):
            assert torch.equal(fourier.units(x_Nd[n : n + 1])[0], together_ND[n])
        assert torch.equal(fourier.units(x_Nd.flip(0)), together_ND.flip(0))
        assert torch.equal(together_ND, together_ND.round())


def test_rows_that_lie_far_off_are_far_and_not_wrong() -> None:
    fourier = random_fourier(2, bandwidth=1e-6)
    units_ND = fourier.units(torch.tensor([[1e30, 0.0], [0.0, 1e30]]))
    assert bool(units_ND.isfinite().all())
    assert not torch.equal(units_ND[0], units_ND[1])
    assert fourier.units(torch.zeros(0, 2)).shape == (0, 512)


def test_bad_rows_and_numbers_are_refused() -> None:
    with pytest.raises(LichenError, match="rows have 4 features, not 5"):
        random_fourier(5, bandwidth=1.0).units(rows(2, 0, 4))
    with pytest.raises(LichenError, match="not finite"):
        random_fourier(1, bandwidth=1.0).units(torch.tensor([[torch.inf]]))
    for width, features, bandwidth in ((0, 5, 1.0), (5, 0, 1.0), (5, 5, 0.0), (5, 5, float("nan"))):
        with pytest.raises(LichenError, match="bandwidth above 0"):
            random_fourier(width, features, bandwidth=bandwidth)


def test_p_counts_permutations_that_differ_no_less() -> None:
    now_QD = torch.tensor([[6.0, 0.0], [4.0, 0.0], [6.0, 0.0], [2.0, 2.0]], dtype=torch.float64)
    sums = {"now": now_QD, "all": torch.tensor([8.0, 4.0]).double(), "rows": torch.tensor([2.0, 2.0]).double()}
    found = mmd_of(sums)
    assert found.squared == (3 - 1) ** 2 + (0 - 2) ** 2
    assert found.p == 2 / 4
    assert (found.rows_then, found.rows_now) == (2, 2)
    with pytest.raises(LichenError, match="0 rows then and 2 now"):
        mmd_of({**sums, "rows": torch.tensor([0.0, 2.0])})
