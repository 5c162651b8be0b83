"""Diversity falls when texts repeat; closed forms where there are any."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator
from lichen.data.synthetic.near_duplicates import close_M
from lichen.research.diversity import distance, distinct, vendi


@given(seed=st.integers(0, 999), rows=st.integers(2, 12), width=st.integers(1, 9))
def test_numbers_are_those_of_all_pairs(seed: int, rows: int, width: int) -> None:
    x_NH = torch.randn(rows, width, generator=torch_generator(seed, "x"), dtype=torch.float64)
    unit = x_NH / x_NH.norm(dim=1, keepdim=True)
    pairs = [1 - float(unit[i] @ unit[j]) for i in range(rows) for j in range(rows) if i != j]
    assert distance(x_NH) == pytest.approx(sum(pairs) / len(pairs), abs=1e-9)
    share = torch.linalg.eigvalsh(unit @ unit.T / rows).tolist()
    assert vendi(x_NH) == pytest.approx(math.exp(-sum(p * math.log(p) for p in share if p > 1e-12)), abs=1e-6)
    assert 1 - 1e-9 <= vendi(x_NH) <= rows + 1e-9
    close = close_M(x_NH[:3], x_NH[1:], cosine=0.9)
    assert close.tolist() == [any(float(a @ b) >= 0.9 for b in unit[1:]) for a in unit[:3]]


def test_repeats_add_nothing() -> None:
    eye = torch.eye(5)
    assert vendi(eye) == pytest.approx(5)
    assert vendi(eye.repeat(7, 1)) == pytest.approx(5)
    assert vendi(torch.ones(4, 3)) == pytest.approx(1)
    assert distance(torch.ones(4, 3)) == pytest.approx(0)
    assert distance(eye) == pytest.approx(1)
    assert distinct(["a b c", "a b c"], 2) == 0.5
    assert distinct(["x"], 2) == 0
    assert close_M(torch.empty(0, 3), eye[:, :3]).tolist() == []
    assert close_M(eye, torch.empty(0, 5)).tolist() == [False] * 5
    for bad in (distance, vendi):
        with pytest.raises(LichenError):
            bad(torch.empty(0, 3))
