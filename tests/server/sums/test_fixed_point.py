"""Exact sums: equal bytes in any order, the plain formula's bytes, and an overflow that is refused in any order.

Legend: C clients.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.server.sums import kernels
from lichen.server.sums.fixed_point import FixedSum, add, load, merge, read_sums


def message(tensors: Tree, first: int = 0, group: str = "g") -> Any:
    C = len(next(iter(tensors.values())))
    ids = torch.arange(first, first + C)
    return Message(group=group, client_C=ids, version_C=ids * 0, tensors=tensors, weight_C=torch.ones(C).double())


def fold(values: Any, weights: Any, order: Any, **more: Any) -> Any:
    total = FixedSum(**more)
    for k in order:
        x = torch.tensor([values[k]], dtype=torch.float64)
        total = add(total, message({"x": x}, k), torch.tensor([weights[k]], dtype=torch.float64))
    return total


def slow(tensors: Tree, weights: Any, scale: int = 40) -> Any:
    """One number at a time."""
    out = []
    for name in sorted(tensors):
        for column in tensors[name].double().reshape(len(weights), -1 if tensors[name].numel() else 0).T.tolist():
            out.append(sum(round(x * w * 2.0**scale) for x, w in zip(column, weights, strict=True) if w > 0))
    return out


@given(
    data=st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(0, 100 * 2**30)), min_size=1, max_size=12),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=80, deadline=None)
def test_any_order_gives_the_same_bytes_near_the_true_sum(data: Any, seed: int) -> None:
    values, weights = [x for x, _ in data], [w / 2**30 for _, w in data]
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    straight, shuffled = fold(values, weights, range(len(data))), fold(values, weights, order)
    folded = [k for k, w in enumerate(weights) if w > 0]
    assert straight.count == len(folded)
    assert straight.weight == sum(w for _, w in data)
    if folded:
        assert torch.equal(straight.units_N, shuffled.units_N)
        assert straight.bound == shuffled.bound
        true = sum((Fraction(values[k]) * Fraction(weights[k]) for k in folded), Fraction(0))
        units = sum(abs(values[k] * weights[k]) for k in folded)
        assert abs(float(read_sums(straight)["x"]) - float(true)) <= len(folded) * 2.0**-41 + 2e-16 * units


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
shapes = st.sampled_from([(), (3,), (2, 4), (5, 1, 2), (0,), (1, 17)])


@given(
    kinds=st.lists(st.tuples(dtypes, shapes), min_size=1, max_size=6),
    clients=st.integers(1, 5),
    cached=st.integers(1, 40),
    abreast=st.integers(1, 4),
    power=st.integers(-30, 12),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=120, deadline=None)
def test_equals_the_plain_formula_however_it_is_cut(
    kinds: Any, clients: int, cached: Any, abreast: Any, power: Any, seed: int
) -> None:
    """Small buffers cut tensors and join them; large values leave the range where float64 sums are exact."""
    g = torch.Generator().manual_seed(seed)
    tensors = {
        f"{k}": (
            torch.randn(clients, *shape, generator=g).double() * (2.0**power if dtype.is_floating_point else 9)
        ).to(dtype)
        for k, (dtype, shape) in enumerate(kinds)
    }
    weights = (torch.randint(0, 40, (clients,), generator=g).double() / 8).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_CACHED", cached)
        patch.setattr("lichen.server.sums.fixed_point._ABREAST", abreast)
        total = add(FixedSum(), message(tensors), torch.tensor(weights).double())
    if any(weights):
        assert total.units_N.tolist() == slow(tensors, weights)
        tops = [
            max((abs(u) for u in slow({n: x[c : c + 1] for n, x in tensors.items()}, [w])), default=0)
            for c, w in enumerate(weights)
        ]
        assert total.bound == sum(tops)
        assert {n: x.shape for n, x in read_sums(total).items()} == {n: x.shape[1:] for n, x in tensors.items()}


def test_sums_past_the_exact_range_of_float64_keep_every_bit() -> None:
    values = [2.0**21 + 2.0**-31, 2.0**-40, 2.0**-40]
    assert fold(values, [1.0] * 3, [0, 1, 2]).units_N.tolist() == [2**61 + 2**9 + 2]
    together = add(FixedSum(), message({"x": torch.tensor(values, dtype=torch.float64)}), torch.ones(3).double())
    assert together.units_N.tolist() == [2**61 + 2**9 + 2]


def test_floats_depend_on_order_and_these_sums_do_not() -> None:
    values, weights = [0.1, 0.7, -0.3, 1e3, -1e3], [1.0] * 5
    orders = [[0, 1, 2, 3, 4], [3, 0, 1, 4, 2], [4, 3, 2, 1, 0]]
    assert len({sum(values[k] for k in order) for order in orders}) > 1
    assert len({int(fold(values, weights, order).units_N) for order in orders}) == 1


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_overflow_is_refused_in_any_order_even_where_signs_would_cancel(order: Any) -> None:
    room = 2.0**22
    assert float(read_sums(fold([room, -room / 2, room / 4], [1.0] * 3, order))["x"]) == room * 0.75
    with pytest.raises(LichenError, match=r"tensor 'x'.*64-bit range"):
        fold([room, -room, room], [1.0] * 3, order)
    parts = [fold([room, -room, room], [1.0] * 3, [k]) for k in order]
    with pytest.raises(LichenError, match="64-bit range"):
        merge(merge(parts[0], parts[1]), parts[2])
    assert float(read_sums(fold([room, -room, room], [1.0] * 3, order, scale=30))["x"]) == room


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_values_that_are_not_finite_but_does_not_look_at_weight_zero(bad: Any) -> None:
    with pytest.raises(LichenError, match="'x' is not finite") as told:
        fold([1.0, bad], [1.0, 1.0], [0, 1])
    assert told.value.where == "message of client 1"
    assert fold([1.0, bad], [1.0, 0.0], [0, 1]).count == 1
    many = {"a": torch.ones(4, 3), "x": torch.ones(4, 2), "y": torch.full((4, 2), 7.0)}
    many["x"][2, 1] = bad
    with pytest.raises(LichenError, match="'x' is not finite") as told:
        add(FixedSum(), message(many, 10), torch.ones(4).double())
    assert told.value.where == "message of client 12"
    spared = add(FixedSum(), message(many, 10), torch.tensor([1.0, 1.0, 0.0, 1.0]).double())
    assert float(read_sums(spared)["y"][0]) == 21
    with pytest.raises(LichenError, match="weight"):
        fold([1.0], [-1.0], [0])
    with pytest.raises(LichenError, match="weight"):
        fold([1.0], [bad], [0])


def test_refuses_sums_of_other_scale_group_names_or_shapes() -> None:
    one = fold([1.0], [1.0], [0])
    with pytest.raises(LichenError, match="scales"):
        merge(one, fold([1.0], [1.0], [0], scale=30))
    for other in (message({"y": torch.ones(1)}), message({"x": torch.ones(1, 2)})):
        with pytest.raises(LichenError, match="tensor"):
            add(one, other, torch.ones(1).double())
    with pytest.raises(LichenError, match="groups"):
        add(one, message({"x": torch.ones(1)}, group="h"), torch.ones(1).double())
    assert merge(FixedSum(), one) is one
    assert merge(one, FixedSum()) is one
    for tensors, header in (({}, {}), ({"units": torch.ones(3)}, {"scale": 40, "count": 1, "weight": 1, "bound": 1})):
        with pytest.raises(LichenError, match="not a sum"):
            load(tensors, header)
