"""Exact sums: equal bytes in any order, and an overflow that is refused in any order."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.core.tree import digest
from lichen.server.fixed_point import FixedSum, add, merge, read


def fold(values, weights, order, **more):
    total = FixedSum(**more)
    for k in order:
        x = torch.tensor([values[k]], dtype=torch.float64)
        total = add(total, {"x": x}, torch.tensor([weights[k]], dtype=torch.float64), client_C=torch.tensor([k]))
    return total


@given(
    data=st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(0, 100)), min_size=1, max_size=12),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=80, deadline=None)
def test_any_order_gives_the_same_bytes_near_the_true_sum(data, seed):
    values, weights = zip(*data, strict=True)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    straight, shuffled = fold(values, weights, range(len(data))), fold(values, weights, order)
    assert digest(straight.tensors) == digest(shuffled.tensors)
    assert straight.bound == shuffled.bound
    folded = [k for k, w in enumerate(weights) if w > 0]
    assert straight.count == len(folded)
    if folded:
        true = sum((Fraction(values[k]) * Fraction(weights[k]) for k in folded), Fraction(0))
        units = sum(abs(values[k] * weights[k]) for k in folded)
        assert abs(float(read(straight)["x"]) - float(true)) <= len(folded) * 2.0**-41 + 2e-16 * units


def test_floats_depend_on_order_and_these_sums_do_not():
    values, weights = [0.1, 0.7, -0.3, 1e3, -1e3], [1.0] * 5
    orders = [[0, 1, 2, 3, 4], [3, 0, 1, 4, 2], [4, 3, 2, 1, 0]]
    assert len({sum(values[k] for k in order) for order in orders}) > 1
    assert len({int(fold(values, weights, order).tensors["x"]) for order in orders}) == 1


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_overflow_is_refused_in_any_order_even_where_signs_would_cancel(order):
    room = 2.0**22
    assert float(read(fold([room, -room / 2, room / 4], [1.0] * 3, order))["x"]) == room * 0.75
    with pytest.raises(LichenError, match="64-bit range"):
        fold([room, -room, room], [1.0] * 3, order)
    assert float(read(fold([room, -room, room], [1.0] * 3, order, scale=30))["x"]) == room


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_values_that_are_not_finite_but_does_not_look_at_weight_zero(bad):
    with pytest.raises(LichenError, match="client 1"):
        fold([1.0, bad], [1.0, 1.0], [0, 1])
    assert fold([1.0, bad], [1.0, 0.0], [0, 1]).count == 1
    with pytest.raises(LichenError, match="weight"):
        fold([1.0], [-1.0], [0])
    with pytest.raises(LichenError, match="weight"):
        fold([1.0], [bad], [0])


def test_refuses_sums_of_other_scale_names_or_shapes():
    one = fold([1.0], [1.0], [0])
    with pytest.raises(LichenError, match="scales"):
        merge(one, fold([1.0], [1.0], [0], scale=30))
    for other in ({"y": torch.ones(1)}, {"x": torch.ones(1, 2)}):
        with pytest.raises(LichenError, match="tensor"):
            add(one, other, torch.ones(1).double(), client_C=torch.tensor([1]))
    assert merge(FixedSum(), one) == one == merge(one, FixedSum())
