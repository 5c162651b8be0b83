"""Payments add up to the cent, whatever the budget, the floor and what clients have brought."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.recipes.artifacts.shares import amount, cents_of, floor_of, shared_out


def test_a_thousand_random_cases_add_up_to_the_cent_and_each_is_within_one_of_its_share() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        clients = rng.randint(1, 40)
        scale = 10 ** rng.uniform(-9, 6)
        brought = [rng.choice([rng.gauss(0.3, 1), 0.0, rng.random()]) * scale for _ in range(clients)]
        brought[rng.randrange(clients)] = scale
        budget, floor = rng.randint(1, 10 ** rng.randint(1, 12)), Fraction(rng.randint(0, 1000), 1000)
        paid = shared_out(budget, brought, floor)
        assert sum(one.cents for one in paid) == budget
        assert sum(one.share for one in paid) == 1
        for x, one in zip(brought, paid, strict=True):
            assert abs(one.cents - budget * one.share) < 1
            assert 0 <= one.floor <= one.cents
            assert x >= 0 or one.cents == 0
            assert x < 0 or one.share >= floor / clients


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.integers(1, 10**9))
def test_more_is_never_paid_less_and_equal_clients_differ_by_a_cent_at_most(brought: list[float], budget: int) -> None:
    if not sum(brought):
        return
    paid = shared_out(budget, brought, Fraction(1, 10))
    order = sorted(range(len(brought)), key=lambda k: brought[k])
    for less, more in pairwise(order):
        assert paid[less].cents <= paid[more].cents + 1
        assert brought[less] != brought[more] or paid[less].share == paid[more].share


def test_a_floor_of_everything_pays_all_alike_and_nothing_brought_needs_one() -> None:
    assert [one.cents for one in shared_out(100, [0.0, 5.0, 0.0], Fraction(1))] == [34, 33, 33]
    for brought in ([0.0, -1.0], [-1.0, -2.0]):
        with pytest.raises(LichenError, match="nobody has brought"):
            shared_out(100, brought, Fraction(1, 10))


@given(st.text(max_size=12) | st.floats().map(str) | st.decimals().map(str) | st.integers().map(str))
def test_any_text_is_an_amount_and_a_share_or_is_refused_by_name(text: str) -> None:
    for read, where, most in ((cents_of, "--budget", 10**17), (floor_of, "--floor", 1)):
        try:
            found = read(text)
        except LichenError as error:
            assert (error.where, bool(error.fix)) == (where, True)  # noqa: PT017
        else:
            assert 0 <= found <= most


def test_amounts_are_read_as_they_are_written() -> None:
    for text, cents in (("1000.00", 100_000), ("0.01", 1), ("7", 700), ("1e3", 100_000), ("99999999.9", 9_999_999_990)):
        assert cents_of(text) == cents
        assert cents_of(amount(cents)) == cents
    for text in ("0", "0.00", "-1", "0.001", "nan", "inf", "", "1,000", "ten", "1e30", "--5", "1000 EUR"):
        with pytest.raises(LichenError) as error:
            cents_of(text)
        assert error.value.where == "--budget"
    assert floor_of("0.1") == Fraction(1, 10)
    for text in ("1.01", "-0.1", "nan", "x", "1e-30"):
        with pytest.raises(LichenError) as error:
            floor_of(text)
        assert error.value.where == "--floor"
