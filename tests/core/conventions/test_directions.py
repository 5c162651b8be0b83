"""Directions: the same bits however they are drawn, on any processor, with any number of threads."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lichen.core.conventions.directions import PIECE, UNIT, Directions, add_direction, draw_direction, pieces
from lichen.core.errors import LichenError

KINDS = ("signs", "bell")
every = pytest.mark.parametrize("kind", KINDS)

PROGRAM = """
import hashlib, torch
from lichen.core.conventions.directions import add_direction, draw_direction
told = hashlib.sha256()
for kind in ("signs", "bell"):
    x = torch.arange(300_001) / 2**18 - 0.5
    for seed, factor in ((1, 1e-3), (2, -0.37), (3, 1 / 3)):
        add_direction(x, seed, "w", factor, kind)
        told.update(draw_direction(seed, "w", 0, 100_003, kind).numpy().tobytes())
    told.update(x.numpy().tobytes())
print(told.hexdigest())
"""


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("signs", [1, 1, 1, -1, -1, -1, -1, -1, -1, -1, 1, -1]),
        ("bell", [-2, 2, -3, -1, 0, 0, 2, 3, 0, 0, 3, 0]),
    ],
)
def test_the_first_numbers_are_these_forever(kind: str, expected: Any) -> None:
    assert draw_direction(7, "layer.weight", 0, 12, kind).tolist() == expected


@every
@given(data=st.data())
def test_pieces_in_any_cut_are_the_whole(kind: str, data: Any) -> None:
    numbers = data.draw(st.integers(1, 5000))
    whole = draw_direction(3, "w", 0, numbers, kind)
    start = data.draw(st.integers(0, numbers))
    stop = data.draw(st.integers(start, numbers))
    assert torch.equal(draw_direction(3, "w", start, stop, kind), whole[start:stop])
    noise, cut = Directions(3, "w", kind), data.draw(st.integers(1, 700))
    assert torch.equal(torch.cat([noise.take(p.stop - p.start) for p in pieces(numbers, cut)]), whole)


@every
def test_has_mean_zero_and_variance_one_and_nothing_in_common_with_others(kind: str) -> None:
    numbers = 200_000
    z = draw_direction(1, "a", 0, numbers, kind).double() * UNIT[kind]
    assert abs(float(z.mean())) < 5 / numbers**0.5
    assert abs(float(z.square().mean()) - 1) < 0.02
    for other in (draw_direction(2, "a", 0, numbers, kind), draw_direction(1, "b", 0, numbers, kind)):
        assert abs(float(z @ (other.double() * UNIT[kind])) / numbers) < 5 / numbers**0.5
    lagged = float(z[1:] @ z[:-1]) / numbers
    assert abs(lagged) < 5 / numbers**0.5


def test_the_bell_has_the_counts_of_sixteen_coins() -> None:
    from math import comb

    counts = torch.bincount(draw_direction(5, "w", 0, 160_000, "bell").long() + 8, minlength=17).double() / 160_000
    expected = torch.tensor([comb(16, k) / 2**16 for k in range(17)], dtype=torch.float64)
    assert float((counts - expected).abs().max()) < 0.005


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_adding_in_place_is_adding_the_whole_direction(kind: str, dtype: torch.dtype) -> None:
    numbers = PIECE + 77
    x = torch.linspace(-1, 1, numbers).to(dtype).view(-1, 1)
    wide = torch.promote_types(dtype, torch.float32)
    z = draw_direction(9, "w", 0, numbers, kind).to(wide).view(-1, 1)
    expected = x + (z * (0.3 * UNIT[kind])).to(wide)
    add_direction(x, 9, "w", 0.3, kind)
    assert x.dtype == dtype
    assert torch.equal(x, expected.to(dtype))


def test_refuses_an_unknown_kind_and_a_tensor_it_cannot_change_in_place() -> None:
    with pytest.raises(LichenError, match="unknown noise 'cauchy'"):
        draw_direction(1, "w", 0, 3, "cauchy")
    with pytest.raises(RuntimeError):
        add_direction(torch.zeros(4, 3).t(), 1, "w", 1.0)


def test_threads_and_processors_draw_the_same_bits() -> None:
    def digest(**settings: Any) -> Any:
        environment = {**os.environ, **settings}
        ran = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    first = digest(OMP_NUM_THREADS="1", ATEN_CPU_CAPABILITY="default", NPY_DISABLE_CPU_FEATURES="AVX2 FMA3")
    assert len(first) == len(hashlib.sha256().hexdigest())
    assert digest(OMP_NUM_THREADS="2") == first
