"""Sums of rounded products against the plain formula, whatever the company, the blocks and the threads.

Legend: m rows, n columns, r rank.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.server.sums.kernels import LIMIT, add_products


def made(m: Any, n: Any, ranks: Any, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(m, r, generator=g).to(dtype), torch.randn(r, n, generator=g).to(dtype)) for r in ranks]


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    power=st.integers(0, 58),
    seed=st.integers(0, 2**20),
    cached=st.sampled_from([1, 64, 2**16]),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_plain_formula_past_the_exact_range_too(
    m: Any, n: Any, ranks: Any, power: Any, seed: int, cached: Any
) -> None:
    pairs, factors = made(m, n, ranks, seed), [1.5 * 2.0**power * (k + 1) / 16 for k in range(len(ranks))]
    plain = torch.zeros(m, n, dtype=torch.int64)
    tops = 0
    for (B, A), f in zip(pairs, factors, strict=True):
        one = torch.zeros(m, n, dtype=torch.float64)
        for r in range(B.shape[1]):
            one += torch.outer(B[:, r].double(), A[r].double())
        plain += (one * f).round().long()
        tops += int((one * f).round().abs().max())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lichen.server.sums.kernels._CACHED", cached)
        got, bound = add_products(None, pairs, factors)
    assert bound >= tops
    if bound < LIMIT:
        # A product of rank > 1 is itself rounded, in an order that is the BLAS's own.
        slack = 0 if max(ranks) == 1 else 1 + sum(ranks) * tops * 2.0**-52
        assert float((got - plain).abs().max()) <= slack
    onto, _ = add_products(got, pairs, factors)
    assert torch.equal(onto, got + got)


@pytest.mark.parametrize(("m", "n", "r"), [(9, 40, 2), (576, 192, 8), (130, 700, 16), (3, 5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_do_not_depend_on_company_place_or_threads(m: Any, n: Any, r: Any, dtype: torch.dtype) -> None:
    pairs, factors = made(m, n, [r] * 6, 1, dtype), [2.0**40 * (1 + k / 7) for k in range(6)]
    whole, _ = add_products(None, pairs, factors)
    parts = torch.zeros(m, n, dtype=torch.int64)
    for k, (B, A) in enumerate(pairs):
        # The same numbers, one element further on in memory and with other strides.
        moved = torch.cat([B.new_zeros(1), B.flatten()])[1:].view(m, r), A.T.contiguous().T
        parts = add_products(parts, [moved], factors[k : k + 1])[0]
    assert torch.equal(parts, whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(add_products(None, pairs[::-1], factors[::-1])[0], whole)
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_or_too_large_leaves_no_room() -> None:
    (B, A), *_ = made(4, 4, [2], 0)
    for broken in (torch.inf, torch.nan, 1e30):
        assert add_products(None, [(B * broken, A)], [1.0])[1] >= LIMIT
