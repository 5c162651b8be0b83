"""How many neighbours clients need: few, that grow like the logarithm, and as rarely too few as was asked."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lichen.core.errors import LichenError
from lichen.core.masks.graph import degree, neighbours


def test_neighbours_grow_like_the_logarithm() -> None:
    counts = (100, 1_000, 10_000, 100_000)
    found = {n: degree(n, dropped=0.1, colluding=0.1) for n in counts}
    print("\n" + ", ".join(f"n {n:,}: k {k}, t {t}" for n, (k, t) in found.items()))
    ks = [found[n][0] for n in counts]
    assert ks == sorted(ks)
    assert all(k % 2 == 0 and k < 6 * math.log2(n) for n, k in zip(counts, ks, strict=True))
    assert ks[3] - ks[2] <= ks[2] - ks[1] <= ks[1] - ks[0]


@pytest.mark.parametrize("n", [*range(2, 40), 100, 333, 1_000])
@pytest.mark.parametrize(("dropped", "colluding"), [(0.0, 0.0), (0.1, 0.1), (0.25, 0.2)])
def test_more_than_half_of_the_holders_open_a_secret(n: int, dropped: float, colluding: float) -> None:
    try:
        k, t = degree(n, dropped=dropped, colluding=colluding)
    except LichenError:
        assert n < 6  # a quarter of so few, rounded up, is too many
        return
    assert k == n - 1 or (k % 2 == 0 and k < n - 1)
    assert k + 1 < 2 * t <= 2 * (k + 1)
    if k == n - 1:
        assert t == (k + 1) // 2 + 1


def test_more_of_either_needs_no_fewer_neighbours() -> None:
    for more in ({"dropped": 0.2}, {"colluding": 0.2}, {"bits": 60}):
        assert (
            degree(2_000, **{"dropped": 0.1, "colluding": 0.1, **more})[0]
            > (degree(2_000, dropped=0.1, colluding=0.1)[0])
        )


@pytest.mark.parametrize(
    ("n", "dropped", "colluding"), [(10, 0.6, 0.0), (10, 0.0, 0.6), (1, 0.0, 0.0), (10, 1.0, 0.0), (10, -0.1, 0.0)]
)
def test_what_no_graph_can_meet_is_refused(n: int, dropped: float, colluding: float) -> None:
    with pytest.raises(LichenError):
        degree(n, dropped=dropped, colluding=colluding)


def pieces(around: dict[int, tuple[int, ...]], left: set[int]) -> int:
    """Parts of the graph among those who are left."""
    count, todo = 0, set(left)
    while todo:
        count += 1
        reached = [todo.pop()]
        while reached:
            near = todo & set(around[reached.pop()])
            todo -= near
            reached += near
    return count


@pytest.mark.parametrize(("n", "dropped", "colluding", "bits"), [(80, 0.2, 0.1, 2), (120, 0.1, 0.25, 3)])
def test_each_bound_fails_as_rarely_as_was_asked(n: int, dropped: float, colluding: float, bits: int) -> None:
    k, t = degree(n, dropped=dropped, colluding=colluding, bits=bits)
    assert k < n - 1
    draw, runs = np.random.default_rng(n), 400
    failed = np.zeros(3)
    for run in range(runs):
        around = neighbours(range(n), k, run.to_bytes(4, "big"))
        order = draw.permutation(n)
        gone = set(order[: round(dropped * n)].tolist())
        liars = set(order[round(dropped * n) :][: round(colluding * n)].tolist())
        failed += (
            pieces(around, set(range(n)) - gone - liars) > 1,
            any(len(liars & set(others)) >= t for others in around.values()),
            any(len(set(others) - gone) < t for others in around.values()),
        )
    print(f"\nk {k}, t {t}: cut, too many colluding, too few survivors in {failed / runs}; each at most {2.0**-bits}")
    assert (failed <= runs * 2.0**-bits + 3 * math.sqrt(runs * 2.0**-bits)).all()


def test_with_far_fewer_neighbours_the_bounds_do_fail() -> None:
    k, _ = degree(80, dropped=0.2, colluding=0.1, bits=2)
    draw, few = np.random.default_rng(0), (k // 4) * 2
    lost = 0
    for run in range(50):
        around, gone = neighbours(range(80), few, bytes([run])), set(draw.permutation(80)[:16].tolist())
        lost += any(len(set(others) - gone) < few // 2 + 1 for others in around.values())
    assert lost > 25
