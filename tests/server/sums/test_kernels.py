"""Sums of rounded products against the plain formula, whatever the company, the blocks and the threads.

Legend: m rows, n columns, r rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.server.sums.kernels import LIMIT, add_products, add_rows


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.5, 3.0 * 2.0**40])
@pytest.mark.parametrize("begun", [False, True])
def test_one_client_alone_is_rounded_as_among_others(dtype: torch.dtype, factor: float, begun: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    halves = torch.arange(-9, 10) / 2  # ties go to the even one
    x_N = torch.cat([halves, torch.randn(1000, generator=draw) * 3, torch.tensor([0.0, -0.0, 2.0**-14])]).to(dtype)
    rows = [part[None] for part in x_N.split([5, 0, 700, len(x_N) - 705])]
    onto_N = torch.randint(-(2**60), 2**60, (len(x_N),), generator=draw) if begun else None
    got_N, top_1 = add_rows(onto_N, rows, torch.tensor([factor], dtype=torch.float64))
    both_N, tops_2 = add_rows(onto_N, [x.expand(2, -1) for x in rows], torch.tensor([factor, 0.0], dtype=torch.float64))
    plain_N = torch.from_numpy(np.rint(x_N.double().numpy() * factor)).long()
    assert torch.equal(got_N, plain_N + (0 if onto_N is None else onto_N))
    assert torch.equal(got_N, both_N)
    assert float(top_1) == float(tops_2[0]) == float(plain_N.abs().max())


@pytest.mark.parametrize("large", [2.0**51 - 1, 2.0**51, -(2.0**51), 2.0**52 + 1, 2.0**60])
def test_one_client_of_large_numbers_keeps_every_bit(large: float) -> None:
    rows = [torch.tensor([[large, 1.0]], dtype=torch.float64)]
    got_N, top_1 = add_rows(None, rows, torch.ones(1, dtype=torch.float64))
    assert got_N.tolist() == [int(large), 1]
    assert float(top_1) == abs(large)


def test_whole_numbers_beside_floats_are_not_rounded_first() -> None:
    rows = [torch.tensor([[2**40 + 1]]), torch.tensor([[0.5]])]
    got_N, _ = add_rows(None, rows, torch.ones(1, dtype=torch.float64))
    assert got_N.tolist() == [2**40 + 1, 0]
